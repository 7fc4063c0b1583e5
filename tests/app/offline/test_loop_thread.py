from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator

import pytest

from sapwood.app.offline.loop_thread import LoopThread
from sapwood.base.errors import EngineUnavailable


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    one = LoopThread("test", closed_reason="it was closed")
    yield one
    one.close()


async def count(to: int, closed: list[str] | None = None) -> AsyncGenerator[int, None]:
    try:
        for number in range(to):
            yield number
            await asyncio.sleep(0)
        if closed is not None:
            await asyncio.Event().wait()
    finally:
        if closed is not None:
            closed.append("closed")


async def fail_after(number: int) -> AsyncGenerator[int, None]:
    yield number
    raise ZeroDivisionError("mine")


def test_results_and_errors(thread: LoopThread) -> None:
    async def work(number: int) -> int:
        await asyncio.sleep(0)
        return 10 // number

    assert thread.run(work(2)) == 5
    with pytest.raises(ZeroDivisionError):
        thread.run(work(0))


def test_it_does_not_wait_for_itself(thread: LoopThread) -> None:
    async def work() -> None:
        thread.run(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="wait for itself"):
        thread.run(work())


def test_items(thread: LoopThread) -> None:
    assert list(thread.items(count(5))) == [0, 1, 2, 3, 4]
    items = thread.items(fail_after(7))
    assert next(items) == 7
    with pytest.raises(ZeroDivisionError, match="mine"):
        next(items)


def test_items_for_another_loop(thread: LoopThread) -> None:
    async def read() -> None:
        assert [item async for item in thread.items_async(count(5))] == [0, 1, 2, 3, 4]
        items = thread.items_async(fail_after(7))
        assert await anext(items) == 7
        with pytest.raises(ZeroDivisionError, match="mine"):
            await anext(items)

    asyncio.run(read())


def test_items_for_its_own_loop(thread: LoopThread) -> None:
    async def read() -> list[int]:
        return [item async for item in thread.items_async(count(5))]

    assert thread.run(read()) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="on the loop that fills it"):
        thread.run(_first(thread))


async def _first(thread: LoopThread) -> int:
    return next(thread.items(count(1)))


def test_leaving_closes_the_source(thread: LoopThread) -> None:
    closed: list[str] = []
    items = thread.items(count(3, closed))
    assert next(items) == 0
    items.close()
    assert closed == ["closed"]

    async def leave() -> None:
        source = thread.items_async(count(3, closed))
        assert await anext(source) == 0
        await source.aclose()

    asyncio.run(leave())
    assert closed == ["closed", "closed"]


def test_closing_cancels_what_does_not_end_by_itself() -> None:
    thread = LoopThread("test", closed_reason="it was closed")
    closed: list[str] = []
    items = thread.items(count(1, closed))
    assert next(items) == 0
    ends: list[str] = []

    def wait() -> None:
        try:
            thread.run(asyncio.sleep(3600))
        except EngineUnavailable as error:
            ends.append(error.message)

    waiting = threading.Thread(target=wait)
    waiting.start()
    thread.close()
    waiting.join(10)
    assert closed == ["closed"]
    assert set(ends) == {"it was closed"}
    with pytest.raises(EngineUnavailable, match="it was closed"):
        next(items)
    items.close()
    for use in (
        lambda: thread.run(asyncio.sleep(0)),
        lambda: thread.call(print),
        lambda: next(thread.items(count(1))),
    ):
        with pytest.raises(EngineUnavailable, match="it was closed"):
            use()
    thread.close()
