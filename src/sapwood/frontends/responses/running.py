"""Responses that are generated in the background, and their listeners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from sapwood.frontends.responses.answer import Event, encoded


class Running:
    """One response in the background: its encoded events so far, for any number of listeners."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self._grown = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_over = False

    def start(self, work: Coroutine[Any, Any, None], ended: Callable[[], None]) -> None:
        """Start the work.

        ended  called once, however the work ends, before the listeners get the last event
        """
        self._task = asyncio.create_task(work)

        def done(_: asyncio.Task[None]) -> None:
            ended()
            self._is_over = True
            self._wake()

        self._task.add_done_callback(done)

    def tell(self, events: Sequence[Event]) -> None:
        self.events += map(encoded, events)
        self._wake()

    async def listen(self, first: int) -> AsyncGenerator[bytes, None]:
        """The events from number `first` on, up to the last."""
        position = first
        while True:
            grown = self._grown
            if position < len(self.events):
                end = len(self.events)
                yield b"".join(self.events[position:end])
                position = end
            elif self._is_over:
                return
            else:
                await grown.wait()

    async def cancel(self) -> None:
        """Cancel the work, and wait for its end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()
