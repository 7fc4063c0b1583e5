"""`sapwood pull`: a model's files, before they are needed."""

from __future__ import annotations

import click

from sapwood.app.cli.engine import engine_of, fetch_with_bar
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.schema.config.model import ModelConfig


@click.command(cls=ConfigCommand)
@click.argument("name", required=False)
@click.option("--list", "show_list", is_flag=True, help="Show the models with a short name.")
@config_options(ModelConfig, only=("revision", "load_format", "offline", "model_checksum"))
def pull(name: str | None, show_list: bool, asked: Asked) -> None:
    """Get the files of a model, and print where they are.

    NAME is a catalogue name, a hub repository (owner/name) or a path; without it, the configured
    model. Files go to $SAPWOOD_HOME, or ~/.cache/sapwood.
    """
    if show_list and name is not None:
        raise click.UsageError("--list shows all models; leave the name out")
    if show_list:
        show_catalogue()
        return
    files = fetch_with_bar(engine_of(asked.with_model(name)).model)
    num_bytes = sum(path.stat().st_size for path in files.weights)
    click.echo(f"{files.name}: {files.path}")
    click.echo(f"{len(files.weights)} weight files, {files.weight_format}, {in_units(num_bytes)}")


def show_catalogue() -> None:
    from sapwood.store import load_catalogue

    entries = list(load_catalogue().values())
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        click.echo(f"{entry.name:{width}}  {entry.description} ({entry.license})")


def in_units(num_bytes: int) -> str:
    """ "98.4 MB"; units of 1000, as download sizes are given."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
