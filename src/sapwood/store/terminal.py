"""A pull's progress as a bar on the terminal. A module of its own, because rich imports slowly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

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

from sapwood.store.progress import Progress, Silent


@dataclass(slots=True)
class _Stage:
    label: str
    total: int | None
    begin_s: float
    done: int = 0


class TerminalProgress:
    """A Progress on a terminal. A console that is no terminal gets two plain lines per stage: when
    the stage begins and, with its seconds, when it has ended.

    lines  whether such a console gets a line for every `advance` too, with the time that is left;
           for stages that advance in few large steps
    """

    def __init__(
        self,
        console: Console,
        *,
        lines: bool = False,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._lines = lines
        self._clock_s = clock_s
        self._bar: RichBar | None = None
        self._stage: _Stage | None = None

    def start(self, label: str, total: int | None) -> None:
        self.finish()
        if not self._console.is_terminal:
            self._stage = _Stage(label, total, self._clock_s())
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
        if self._stage is not None and self._lines:
            self._show_advance(self._stage, amount)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._stage is not None:
            ended, self._stage = self._stage, None
            self._print(f"{ended.label}: {self._clock_s() - ended.begin_s:.1f} s")

    def _show_advance(self, stage: _Stage, amount: int) -> None:
        stage.done += amount
        if stage.total is None or not 0 < stage.done < stage.total:
            return
        passed_s = self._clock_s() - stage.begin_s
        left_s = passed_s * (stage.total - stage.done) / stage.done
        self._print(
            f"{stage.label}: {stage.done / stage.total:.0%} after {in_minutes(passed_s)}, "
            f"about {in_minutes(left_s)} left"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)


def in_minutes(seconds: float) -> str:
    """ "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def bar_on_terminal() -> Progress:
    """A bar on standard error if that is a terminal, else nothing: the log tells the same."""
    console = Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else Silent()
