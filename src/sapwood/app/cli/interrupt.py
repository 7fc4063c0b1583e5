"""Ctrl-C as a request to stop one piece of work, instead of an exception at any point."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """While the body runs, the first Ctrl-C calls `stop` and a second raises KeyboardInterrupt.

    For the main thread. An exception in the middle of an event loop or HTTP client would leave that
    in a state in which it cannot go on.
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
