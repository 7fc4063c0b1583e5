"""`sapwood verify`: lists of checksums of a model's files."""

from __future__ import annotations

from pathlib import Path

import click

from sapwood.app.cli.engine import bar
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.app.cli.pull import in_units
from sapwood.base.errors import ConfigError
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.env import environment, home
from sapwood.store.manifest import MANIFEST_NAME

SHOWN = ("revision", "load_format", "offline")


@click.group()
def verify() -> None:
    """Make and check lists of checksums (manifests) of a model's files.

    serve and every other command that loads a model take --model-checksum, which checks before
    anything is read.
    """


@verify.command(cls=ConfigCommand)
@click.argument("name")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=MANIFEST_NAME,
    show_default=True,
    help="The manifest to write.",
)
@click.option("--force", is_flag=True, help="Replace the manifest if there is one.")
@config_options(ModelConfig, only=SHOWN)
def generate(name: str, output: Path, force: bool, asked: Asked) -> None:
    """Write SHA-256 and size of every file of a model.

    NAME is a path, a catalogue name or a hub repository (owner/name).
    """
    from sapwood.store import open_store
    from sapwood.store.manifest import write_manifest
    from sapwood.store.verify import generate as checksums_of

    if output.exists() and not force:
        raise ConfigError(f"{output} exists; give another --output, or --force to replace it")
    model = asked.with_model(name).build(ModelConfig)
    progress = bar()
    fetched = open_store(home(environment())).locate(
        model.model,
        revision=model.revision,
        load_format=model.load_format,
        offline=model.offline,
        progress=progress,
    )
    files = checksums_of(fetched, progress)
    write_manifest(output, files)
    num_bytes = sum(file.size or 0 for file in files.values())
    click.echo(f"{output}: {len(files)} files of {fetched.path}, {in_units(num_bytes)}")


@verify.command(cls=ConfigCommand)
@click.argument("name")
@click.argument("source", default="origin")
@config_options(ModelConfig, only=SHOWN)
def check(name: str, source: str, asked: Asked) -> None:
    """Compare a model's files with what SOURCE says; exit with 1 if one is not as expected.

    NAME is a path, a catalogue name or a hub repository (owner/name). SOURCE is a manifest, a hub
    repository, or origin (the default): what the hub or the catalogue says about this model.
    """
    from sapwood.store import open_store

    model = asked.with_model(name).build(ModelConfig)
    checked = open_store(home(environment())).verify(
        model.model,
        source,
        revision=model.revision,
        load_format=model.load_format,
        offline=model.offline,
        progress=bar(),
    )
    click.echo(
        f"{model.model}: {checked.num_files} files are what {source} says, "
        f"{in_units(checked.num_bytes)}"
    )
