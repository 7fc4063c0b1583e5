"""Calls of a storage in a thread of their own, beside the engine's loop."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_Work = Callable[[], None]


class StorageWorker:
    """Does calls one after the other. What follows from a call is done where `finish` is called."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._ended: deque[_Work] = deque()
        self.num_open = 0
        """Calls whose consequence was not yet drawn."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(
        self, call: Callable[[], T], then: Callable[[T], None], fail: Callable[[Exception], None]
    ) -> None:
        """Call in the thread; with its result `then` is called, or `fail` with what it raised."""
        self.num_open += 1

        def work() -> None:
            try:
                result = call()
            except Exception as error:  # noqa: BLE001 - told where it can be dealt with
                failure = error
                self._ended.append(lambda: fail(failure))
            else:
                self._ended.append(lambda: then(result))

        self._calls.put(work)

    def finish(self) -> None:
        """Draw the consequences of the calls that have ended."""
        while self._ended:
            self.num_open -= 1
            self._ended.popleft()()

    def close(self, timeout_s: float) -> None:
        """End the thread after its calls; one that takes longer is left behind."""
        self._calls.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            work()
