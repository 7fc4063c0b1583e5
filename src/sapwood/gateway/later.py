"""Functions that are called after the same delay, with one timer of the loop for all of them.

A request that is answered at once takes its functions back before their time. A timer for each
would be made and cancelled per request, which costs more than all that routing does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count


class Later:
    """Calls functions `delay_s` seconds after they were added, in that order."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._waiting: dict[int, tuple[float, Callable[[], None]]] = {}
        self._numbers = count()
        self._has_timer = False

    def add(self, function: Callable[[], None]) -> int:
        """The number by which `discard` knows the function. It must raise nothing."""
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        self._waiting[number] = (loop.time() + self._delay_s, function)
        if not self._has_timer:
            self._has_timer = True
            loop.call_later(self._delay_s, self._on_timer, loop)
        return number

    def discard(self, number: int) -> None:
        """The function is not called, unless it has been."""
        self._waiting.pop(number, None)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        while self._waiting:
            number = next(iter(self._waiting))
            due_s, function = self._waiting[number]
            if due_s > now_s:
                loop.call_later(due_s - now_s, self._on_timer, loop)
                return
            del self._waiting[number]
            function()
        self._has_timer = False
