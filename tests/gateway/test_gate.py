"""The queue in front of the workers."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.gate import Gate
from sapwood.http.errors import TooManyRequests


def gate(max_open: int | None, max_waiting: int = 1000) -> Gate:
    return Gate(max_open=max_open, max_waiting=max_waiting, max_wait_s=60, max_per_second=None)


def test_requests_go_through_in_their_order() -> None:
    async def run() -> None:
        made, order = gate(1), []

        async def one(number: int) -> None:
            await made.enter()
            order.append(number)
            await asyncio.sleep(0)
            made.leave()

        await asyncio.gather(*(one(number) for number in range(20)))
        assert order == list(range(20))

    asyncio.run(run())


def test_the_queue_is_bounded() -> None:
    async def run() -> None:
        made = gate(1, max_waiting=1)
        await made.enter()
        waiting = asyncio.create_task(made.enter())
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests, match="--queue-size"):
            await made.enter()
        made.leave()
        await waiting
        made.leave()
        assert (made.num_open, made.num_waiting) == (0, 0)

    asyncio.run(run())


@given(max_open=st.integers(1, 4), num_requests=st.integers(1, 30), seed=st.integers(0, 99))
def test_whoever_gives_up_leaves_no_place_taken(
    max_open: int, num_requests: int, seed: int
) -> None:
    async def run() -> None:
        rng, made, most = random.Random(seed), gate(max_open), 0

        async def one() -> None:
            nonlocal most
            await made.enter()
            try:
                most = max(most, made.num_open)
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                made.leave()

        tasks = [asyncio.create_task(one()) for _ in range(num_requests)]
        while not all(task.done() for task in tasks):
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most <= max_open
        assert (made.num_open, made.num_waiting) == (0, 0)

    asyncio.run(run())
