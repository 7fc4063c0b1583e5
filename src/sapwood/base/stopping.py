"""SIGTERM and Ctrl-C from the first moment of a process that serves."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

UNWIND_S = 1.0
"""What an exception has not ended after this long has been swallowed somewhere."""


class EarlyExit:
    """Until there is something to stop in order, SIGTERM ends the process with status 0.

    It does so by SystemExit, so that files are closed. But an exception that comes out of the blue
    may strike where it is only reported, such as inside a finaliser; so an alarm follows.
    """

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The interpreter's own end brings the default action back, but leaves this.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # An interpreter that ends has not swallowed it, however long its end takes.
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
        """SystemExit if the process was asked to end before."""
        if signal.getsignal(signal.SIGALRM) is _end_now:
            sys.exit(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def act_with(self, act: Callable[[int], None]) -> None:
        """From now on a signal calls `act`; so does one that came before, at once."""
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
