"""A pull's progress as a bar on the terminal. A module of its own, because rich imports slowly."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichBar

from sapwood.models.store.progress import Progress, Silent


class TerminalProgress:
    """A Progress on a terminal. A console that is no terminal gets two plain lines per stage: when
    the stage begins and, with its seconds, when it has ended."""

    def __init__(self, console: Console, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock_s = clock_s
        self._bar: RichBar | None = None
        self._stage: tuple[str, float] | None = None

    def start(self, label: str, total: int | None) -> None:
        self.finish()
        if not self._console.is_terminal:
            self._stage = label, self._clock_s()
            self._print(label)
            return
        self._bar = RichBar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
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
        if self._stage is not None:
            label, begin_s = self._stage
            self._stage = None
            self._print(f"{label}: {self._clock_s() - begin_s:.1f} s")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)


def bar_on_terminal() -> Progress:
    """A bar on standard error if that is a terminal, else nothing: the log tells the same."""
    console = Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else Silent()
