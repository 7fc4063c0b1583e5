"""A thread with an event loop, to which other threads hand work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

CLOSE_S = 2.0


class LoopThread:
    """Runs tasks until it is closed, which cancels them."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run that as a task. From any thread."""
        self.call(lambda: self.keep(work))

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The same, from a task of this thread."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def call(self, act: Callable[[], object]) -> None:
        """Call that in the thread, after all earlier calls."""
        self._loop.call_soon_threadsafe(act)

    def close(self) -> None:
        """May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self.call(self._end)
        self._thread.join(CLOSE_S)

    def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._loop.create_task(self._stop_after(list(self._tasks)))

    async def _stop_after(self, tasks: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        # What these tasks had begun themselves, and cancelled as they ended.
        rest = asyncio.all_tasks(self._loop)
        for task in rest:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        self._loop.close()
