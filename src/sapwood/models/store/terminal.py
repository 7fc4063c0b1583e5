"""A pull's progress as a bar on the terminal. A module of its own, because rich imports slowly."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichBar

from sapwood.models.store.progress import Progress, Silent


class TerminalProgress:
    """A Progress on a terminal; a console that is no terminal gets one plain line per stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichBar | None = None

    def start(self, label: str, total: int | None) -> None:
        self.finish()
        if not self._console.is_terminal:
            self._console.print(label, highlight=False, markup=False)
            return
        self._bar = RichBar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.add_task(label, total=total)
        self._bar.start()

    def advance(self, amount: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def bar_on_terminal() -> Progress:
    """A bar on standard error if that is a terminal, else nothing: the log tells the same."""
    console = Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else Silent()
