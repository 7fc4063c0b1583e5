"""`sapwood models`: the architectures that are served."""

from __future__ import annotations

from collections.abc import Sequence

import click

HEADER = ("Architecture", "Models", "GGUF", "One call per step", "Convert", "Pictures")


@click.command("models")
def models() -> None:
    """List the architectures that are served, and what works for each.

    An architecture is what config.json calls it. Quantised checkpoints, and quantisation while a
    model is loaded, work for all of them. GGUF: what GGUF files call it, if they are read. One call
    per step: whether kernels on CPUs compute a step in one call, which is faster for small models.
    Convert: whether `sapwood convert` takes it. Pictures: whether the engine sees pictures and
    videos.
    """
    from sapwood.app.cli.stored import print_table

    print_table([tuple(cell.upper() for cell in HEADER), *rows()])


def rows() -> list[tuple[str, ...]]:
    """Cells of HEADER for each architecture."""
    from sapwood.models.capabilities import capabilities

    return [
        (
            one.name,
            one.models,
            ", ".join(one.gguf) or "-",
            _yes(one.is_recorded),
            _yes(one.converts),
            _yes(one.sees),
        )
        for one in capabilities()
    ]


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same as a table of a page."""
    lines = [HEADER, ["---"] * len(HEADER)]
    lines += [[f"`{name}`", *rest] for name, *rest in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "-"
