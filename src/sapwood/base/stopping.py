"""SIGTERM and Ctrl-C from the first moment of a process that serves."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

UNWIND_S = 1.0
"""A process that still runs this long after SystemExit has swallowed the exception somewhere."""


class EarlyExit:
    """Until there is something to stop in order, SIGTERM ends the process with status 0.

    The handler raises SystemExit, so that files are closed. If the signal comes while a finaliser
    runs, Python prints that exception and goes on; so an alarm ends the process a little later.
    """

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # At its end the interpreter would restore SIGTERM's default action, but it leaves SIG_IGN.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # An interpreter that is ending has not swallowed the exception, however long its end takes.
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, _end_now)
        signal.setitimer(signal.ITIMER_REAL, UNWIND_S)
        sys.exit(0)


def _end_now(number: int, frame: FrameType | None) -> None:
    os._exit(0)


class StopSignals:
    """Takes SIGTERM and SIGINT, and remembers the first until somebody can act on it."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._act: Callable[[int], None] | None = None

    def install(self) -> None:
        """Raises SystemExit if SIGTERM came before, while EarlyExit was in place."""
        if signal.getsignal(signal.SIGALRM) is _end_now:
            sys.exit(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def act_with(self, act: Callable[[int], None]) -> None:
        """From now on a signal calls `act`; if a signal came before, `act` is called at once."""
        self._act = act
        if self.first is not None:
            act(self.first)

    def ignore(self) -> None:
        """From now on signals have no effect; the process is ending already."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = number
        if self._act is not None:
            self._act(number)
