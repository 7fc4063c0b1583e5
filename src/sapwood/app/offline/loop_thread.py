"""An event loop in a thread of its own, and its use from other threads and other loops."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sapwood.base.errors import EngineUnavailable

CANCEL_LIMIT_S = 5.0
"""How long a caller that cancels waits at most for the end of the cancelled work."""
WIND_UP_S = 1.0
"""How long work may take to end by itself when the loop is closed, before it is cancelled."""

T = TypeVar("T")


class LoopThread:
    """An event loop that runs in a daemon thread until it is closed.

    closed_reason  the message of EngineUnavailable for callers after the end
    """

    def __init__(self, name: str, *, closed_reason: str) -> None:
        self._closed_reason = closed_reason
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this loop; if so, it would wait for itself for ever."""
        return threading.get_ident() == self._thread.ident

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function on the loop, soon. EngineUnavailable if the loop was closed."""
        with self._lock:
            if self._closed:
                raise self.unavailable()
            self._loop.call_soon_threadsafe(function, *arguments)

    def unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(self._closed_reason)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Job[T]:
        """Run a coroutine on the loop. EngineUnavailable if the loop was closed."""
        job = Job(self, coroutine)
        try:
            self.call(job.begin)
        except EngineUnavailable:
            coroutine.close()
            raise
        return job

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and return its result; an interrupted caller cancels the coroutine."""
        if self.is_current:
            coroutine.close()
            raise RuntimeError(
                "this would wait for itself: it was called from the engine's own event loop, "
                "such as from an on_finish function; call it from another thread"
            )
        return self.start(coroutine).result()

    def items(self, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """The items that `source` yields on the loop, for the calling thread.

        A task of the loop reads ahead, so that no item costs a round trip between the threads.
        Closing this generator closes `source`; so does an interrupt.
        """
        arrived: queue.SimpleQueue[T | _End] = queue.SimpleQueue()

        def put(item: T | _End) -> bool:
            arrived.put(item)
            return True

        if self.is_current:
            raise RuntimeError("an iterator cannot be read on the loop that fills it")
        job = self.start(_pump(source, put, self.unavailable))
        try:
            while not isinstance(item := arrived.get(), _End):
                yield item
            item.raise_error()
        finally:
            job.cancel()

    async def items_async(self, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """`items` for a caller with an event loop of its own, which is never blocked."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[T | _End] = asyncio.Queue()

        def put(item: T | _End) -> bool:
            try:
                loop.call_soon_threadsafe(arrived.put_nowait, item)
            except RuntimeError:  # the reader's loop was closed: nobody reads any more
                return False
            return True

        job = self.start(_pump(source, put, self.unavailable))
        ended = False
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, _End):
                    ended = True
                    item.raise_error()
                    return
                yield item
        finally:
            job.ask_to_end()
            # There is no waiting on a closed loop.
            if not ended and not loop.is_closed():
                with suppress(TimeoutError):
                    async with asyncio.timeout(CANCEL_LIMIT_S):
                        while not isinstance(await arrived.get(), _End):
                            continue

    async def run_async(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """`run` for a caller with an event loop of its own; cancelling it cancels the coroutine."""

        async def only() -> AsyncGenerator[T, None]:
            yield await coroutine

        try:
            async with aclosing(self.items_async(only())) as results:
                return await anext(results)
        except EngineUnavailable:
            coroutine.close()  # it may never have begun
            raise

    def close(self) -> None:
        """End all running work, then the thread. May be called twice, but not on the loop."""
        if self.is_current:
            raise RuntimeError("an event loop cannot wait for its own end")
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._begin_wind_up)
        self._thread.join()
        self._loop.close()

    def _begin_wind_up(self) -> None:
        self._winding_up = self._loop.create_task(self._wind_up())

    async def _wind_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=WIND_UP_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        self._loop.stop()


class Job(Generic[T]):
    """A coroutine on a LoopThread, as another thread sees it."""

    def __init__(self, thread: LoopThread, coroutine: Coroutine[Any, Any, T]) -> None:
        self._thread = thread
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self._ended = threading.Event()

    def begin(self) -> None:
        """Start the coroutine. Called on the loop."""
        self._task = asyncio.ensure_future(self._coroutine)
        self._task.add_done_callback(self._end)

    def result(self) -> T:
        """Wait for the end. EngineUnavailable if the loop was closed before it came."""
        try:
            self._ended.wait()
        except BaseException:
            # Usually Ctrl-C: nobody waits for this work any more, so it must not go on.
            self.cancel()
            raise
        assert self._task is not None, "a job that ended has begun"
        if self._task.cancelled():
            raise self._thread.unavailable()
        return self._task.result()

    def cancel(self) -> None:
        """Cancel the coroutine, and wait for its end, except on the loop where it runs."""
        if self._ended.is_set():
            return
        self.ask_to_end()
        if not self._thread.is_current:
            self._ended.wait(CANCEL_LIMIT_S)

    def ask_to_end(self) -> None:
        # A closed loop has already cancelled everything.
        with suppress(EngineUnavailable):
            self._thread.call(self._cancel)

    def _cancel(self) -> None:
        assert self._task is not None, "a loop calls in the order in which it was asked to"
        self._task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # Reading the error keeps asyncio from logging it.
        self._ended.set()


@dataclass(frozen=True, slots=True)
class _End:
    """Follows the last item."""

    error: BaseException | None

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


async def _pump(
    source: AsyncGenerator[T, None],
    put: Callable[[T | _End], bool],
    unavailable: Callable[[], EngineUnavailable],
) -> None:
    """Hand on every item, then one _End; `put` returns whether there is still a reader."""
    error: BaseException | None = None
    try:
        async with aclosing(source) as items:
            async for item in items:
                if not put(item):
                    break
    except asyncio.CancelledError:
        # If the reader cancelled this, nobody reads the error.
        error = unavailable()
        raise
    except Exception as caught:  # noqa: BLE001 - it is raised where the items are read
        error = caught
    finally:
        put(_End(error))
