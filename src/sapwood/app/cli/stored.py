"""`sapwood list` and `sapwood rm`: the models on this disk."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence

import click

from sapwood.app.cli.pull import in_units
from sapwood.base.errors import ConfigError
from sapwood.schema.env import environment, home


@click.command("list")
def list_models() -> None:
    """List the models on this disk, the last used first.

    These are the models in $SAPWOOD_HOME, or ~/.cache/sapwood. Models that are given by a path are
    not in the list. `sapwood pull --list` shows which models have a short name.
    """
    from sapwood.store import load_catalogue
    from sapwood.store.inventory import stored_models

    models = stored_models(home(environment()), load_catalogue())
    if not models:
        click.echo("no models yet; get one with: sapwood pull smollm2-135m", err=True)
        return
    rows = [("NAME", "SIZE", "WEIGHTS", "USED")]
    for model in models:
        used = "-" if model.used_s is None else ago(time.time() - model.used_s)
        rows.append((", ".join(model.names), in_units(model.num_bytes), model.numbers, used))
    print_table(rows)


@click.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: tuple[str, ...]) -> None:
    """Remove models from this disk, by the names that `sapwood list` shows.

    All files of a hub repository are removed, of every revision. A model that was given by a path
    is yours, and stays.
    """
    from sapwood.store import inventory, load_catalogue

    directory = home(environment())
    models = inventory.stored_models(directory, load_catalogue())
    by_name = {name: model for model in models for name in model.names}
    unknown = [name for name in names if name not in by_name]
    if unknown:  # nothing is removed then
        close = difflib.get_close_matches(unknown[0], sorted(by_name), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"{unknown[0]} is no model on this disk{hint}; `sapwood list` shows what there is"
        )
    for model in {by_name[name].directory: by_name[name] for name in names}.values():
        inventory.remove(directory, model)
        click.echo(f"removed {model.names[0]}, {in_units(model.num_bytes)}")


def ago(seconds: float) -> str:
    """ "just now", "5 minutes ago", "3 days ago"."""
    for unit, length_s in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length_s)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; the first row has their titles."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
