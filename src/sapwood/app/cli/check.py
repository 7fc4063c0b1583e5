"""`sapwood check`: shows the facts of this machine, and how a model would run on it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from sapwood.app.cli.engine import engine_of, fetch_with_bar
from sapwood.app.cli.kinds import draws
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.base.errors import StartupError
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.env import environment, home

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sapwood.app.building.resolving import Resolved
    from sapwood.app.cli.machine_report import Report, Row

UNRESOLVED = 1
"""Exit status when the configuration does not fit this machine or the model cannot be had."""


@click.command(cls=ConfigCommand)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@config_options(*COMPONENTS, PaintingConfig)
@click.pass_context
def check(ctx: click.Context, name: str | None, as_json: bool, asked: Asked) -> None:
    """Show what this machine has, and what would run on it and why.

    NAME is the same as --model NAME. Takes the options of serve; the model's files are fetched if
    they are not cached (--offline forbids it), but it is not loaded.
    """
    asked = asked.with_model(name)
    report = inspect_painting(asked) if draws(asked) else inspect(asked)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, default=str))
    else:
        print_report(report)
    if report.problem is not None:
        ctx.exit(UNRESOLVED)


def inspect_painting(asked: Asked) -> Report:
    """The same of a diffusers folder: what its components take in memory."""
    from sapwood.app.cli.machine_report import Row, make_report
    from sapwood.app.painting.loading import plan_painting

    engine, rows, problem = asked.engine(), [], None
    try:
        plan = plan_painting(engine.model.model, asked.build(PaintingConfig))
        rows = [Row(name="pipeline", value=plan.folder.pipeline)]
        rows += [Row(name="", value=note) for note in plan.notes]
        problem = plan.problem
    except StartupError as error:
        problem = error.message
    return replace(make_report(engine, asked.given, None, problem), model=rows)


def inspect(asked: Asked) -> Report:
    """The report on machine and software, even if the configuration cannot be resolved."""
    from sapwood.app.building.gpu import graphs_decisions
    from sapwood.app.building.resolving import resolve_config
    from sapwood.app.cli.machine_report import make_report

    engine = asked.engine()
    resolved, problem = None, None
    try:
        engine = engine_of(asked)
        fetch_with_bar(engine.model)
        resolved = resolve_config(engine, home=home(environment()), is_verified=True)
        if resolved.pooling is None:
            resolved = _with_answers(resolved)
            resolved.decisions.extend(graphs_decisions(resolved))
    except StartupError as error:
        problem = error.message
    return make_report(engine, asked.given, resolved, problem)


def _with_answers(resolved: Resolved) -> Resolved:
    """Decided, too, what a server decides about the model's answers, apart from its engine."""
    from sapwood.app.serving.services import decisions_about_answers

    decisions = decisions_about_answers(resolved.files, resolved.config.model)
    chosen: dict[str, Any] = {decision.option: decision.value for decision in decisions}
    config = replace(resolved.config, model=replace(resolved.config.model, **chosen))
    return replace(resolved, config=config, decisions=[*resolved.decisions, *decisions])


def print_report(report: Report) -> None:
    sections = {
        "Machine": report.machine,
        "Software": report.software,
        "Kernels": report.kernels,
        "Model": report.model,
        "Configuration": report.configuration,
    }
    for title, rows in sections.items():
        if rows:
            _print_table(title, rows)
    if report.problem is not None:
        click.echo(f"sapwood: {report.problem}", err=True)


def _print_table(title: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for row in rows:
        value = "" if row.value is None else str(row.value)
        # As text, because square brackets in a path or a version are no markup.
        table.add_row(row.name, Text(value), Text(row.why))
    console = Console()
    console.print(table)
    console.print()
