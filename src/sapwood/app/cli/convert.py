"""`sapwood convert`: a checkpoint into one of fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sapwood.app.cli.engine import engine_of
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.base.errors import ConfigError
from sapwood.convert.options import ConvertOptions
from sapwood.schema.config.execution import ExecutionConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.env import environment, home

if TYPE_CHECKING:
    from sapwood.app.converting import Converted, Job

MODEL_OPTIONS = ("revision", "load_format", "dtype", "offline")
EXECUTION_OPTIONS = ("device", "num_threads", "kernels")


@click.command(cls=ConfigCommand)
@click.argument("name")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--ignore",
    multiple=True,
    metavar="REGEX",
    help="Leave linear layers as they are whose name this matches from its beginning; may be given "
    "several times. The output layer and the embedding always stay.",
)
@click.option(
    "--merge-lora",
    metavar="ADAPTER",
    help="Merge a LoRA adapter into the weights, and convert nothing: ADAPTER is a folder, a "
    "catalogue name or a hub repository. The result can be converted afterwards.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be made, and write nothing.")
@click.option("--force", is_flag=True, help="Replace a model that is at OUTPUT.")
@config_options(
    ConvertOptions,
    ModelConfig,
    ExecutionConfig,
    only={*MODEL_OPTIONS, *EXECUTION_OPTIONS, *ConvertOptions.__dataclass_fields__},
)
def convert(
    name: str,
    output: Path,
    ignore: tuple[str, ...],
    merge_lora: str | None,
    dry_run: bool,
    force: bool,
    asked: Asked,
) -> None:
    """Write a model with its linear layers in fewer bits, or with a LoRA adapter merged.

    NAME is a catalogue name, a hub repository (owner/name) or a path; OUTPUT is the directory to
    make, in a format that sapwood, vLLM and transformers read. It has the tokenizer and chat
    template too, and conversion.json with what was measured.
    """
    # Built first: a contradiction must not show only after the model has been fetched.
    options = asked.build(ConvertOptions)
    from rich.console import Console

    from sapwood.app.converting import estimate, merge_adapter, prepare, run
    from sapwood.store.terminal import TerminalProgress, in_minutes

    progress = TerminalProgress(Console(stderr=True), lines=True)
    if merge_lora is not None:
        if options != ConvertOptions() or ignore or dry_run:
            raise ConfigError(
                "--merge-lora converts nothing, so options of conversions have no effect; merge "
                "first, then convert the result"
            )
        merged = merge_adapter(
            engine_of(asked.with_model(name)),
            merge_lora,
            output.expanduser().absolute(),
            force=force,
            home=home(environment()),
            progress=progress,
        )
        untied = ", which has an output layer of its own now" if merged.is_untied else ""
        click.echo(
            f"wrote {output}{untied}: {merged.num_layers} layers changed, "
            f"{merged.num_bytes / 1e6:.1f} MB"
        )
        return
    job = prepare(
        engine_of(asked.with_model(name)),
        options,
        output.expanduser().absolute(),
        ignore=ignore,
        force=force,
        home=home(environment()),
        progress=progress,
    )
    console = Console()
    for line in (*job.describe(), f"takes about {in_minutes(estimate(job))} on this machine"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not dry_run:
        print_result(job, run(job, progress), console)


def print_result(job: Job, converted: Converted, console: object) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    table = Table()
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for row in converted.rows():
        table.add_row(*row)
    console.print(table)
    console.print(f"wrote {job.output}", markup=False, highlight=False, soft_wrap=True)
