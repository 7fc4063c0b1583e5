"""Ctrl-C as a wish to stop one thing, rather than an exception at any point."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """While the body runs, the first Ctrl-C calls `stop` and a second raises KeyboardInterrupt.

    For the main thread. An exception between two lines of somebody's event loop or HTTP client
    would leave them in a state from which they can't go on.
    """
    num_interrupts = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal num_interrupts
        num_interrupts += 1
        if num_interrupts > 1:
            raise KeyboardInterrupt
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
