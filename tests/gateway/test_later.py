"""Functions called after the same delay."""

from __future__ import annotations

import asyncio

from sapwood.gateway.later import Later


def test_functions_are_called_in_their_order_and_not_before_their_time() -> None:
    async def run() -> None:
        later, loop = Later(0.05), asyncio.get_running_loop()
        called: list[tuple[str, float]] = []

        def add(name: str) -> int:
            begun_s = loop.time()
            return later.add(lambda: called.append((name, loop.time() - begun_s)))

        add("a")
        await asyncio.sleep(0.02)
        given_up = add("b")
        add("c")
        later.discard(given_up)
        while len(called) < 2:
            await asyncio.sleep(0.005)
        # The timer has ended by now; the next function starts one again.
        add("d")
        while len(called) < 3:
            await asyncio.sleep(0.005)
        later.discard(given_up)
        assert [name for name, _ in called] == ["a", "c", "d"]
        assert all(after_s >= 0.049 for _, after_s in called)

    asyncio.run(run())


def test_a_function_may_add_another() -> None:
    async def run() -> None:
        later, ended = Later(0.01), asyncio.Event()

        def add() -> None:
            later.add(ended.set)

        later.add(add)
        async with asyncio.timeout(10):
            await ended.wait()

    asyncio.run(run())
