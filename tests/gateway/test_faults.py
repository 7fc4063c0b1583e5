"""Four engines under load, of which some fail: no request is lost, and no connection."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import httpx
import pytest

from sapwood.gateway.breaker import BreakerState
from sapwood.gateway.worker import WorkerState
from tests.gateway.stubs import Bench, Running, Stub, bench
from tests.tiers import long_only

OPTIONS = {
    "health_check_interval_secs": 0.1,
    "health_check_timeout_secs": 0.2,
    "cb_failure_threshold": 3,
    "cb_timeout_duration_secs": 0.3,
    "retry_max_retries": 8,
    "retry_budget_ratio": 1.0,
    "stream_idle_timeout_secs": 5.0,
}
NUM_CLIENTS = 12


async def client(made: Bench, requests: int, seed: int, outcomes: Counter[str]) -> None:
    """Sends requests one by one, half of them streams, and says what became of each."""
    rng = random.Random(seed)
    for _ in range(requests):
        stream = rng.random() < 0.5
        try:
            prompt = f"{rng.getrandbits(64):x}" * rng.randrange(1, 100)
            answer = await made.post(stream=stream, prompt=prompt)
        except httpx.RemoteProtocolError:
            outcomes["cut off"] += 1
            continue
        if answer.status_code != 200:
            outcomes[f"status {answer.status_code}"] += 1
        elif not stream:
            assert set(answer.json()) == {"worker", "choices"}
            outcomes["answered"] += 1
        elif answer.text.endswith("[DONE]\n\n"):
            # From one worker, each event once: nothing was sent a second time.
            events = answer.text.split("\n\n")[:-2]
            assert [f'"n": {index}}}' in event for index, event in enumerate(events)] == [True] * 3
            assert len({event.split('"n"')[0] for event in events}) == 1
            outcomes["answered"] += 1
        else:
            assert "broke off" in answer.text
            outcomes["broke off"] += 1


async def nothing_is_held(made: Bench) -> None:
    while made.num_open():
        await asyncio.sleep(0.01)
    assert made.gateway.gate.num_waiting == 0


@pytest.mark.parametrize("policy", ["round_robin", "cache_aware", "power_of_two"])
@pytest.mark.parametrize("requests", [15, *long_only(200)])
def test_one_killed_one_hung_one_slow_one_refusing(policy: str, requests: int) -> None:
    async def run() -> None:
        stubs = killed, hung, slow, refusing = [Stub(name) for name in "abcd"]
        outcomes: Counter[str] = Counter()
        async with bench(*stubs, policy=policy, **OPTIONS) as made:
            clients = [
                asyncio.create_task(client(made, requests, -1 - number, outcomes))
                for number in range(NUM_CLIENTS)
            ]
            while outcomes.total() < 20:
                await asyncio.sleep(0.005)
            slow.event_s = 0.03
            refusing.behaviour = 500
            hung.behaviour, hung.health = "hang", "hang"
            port_of_killed = await made.engines[0].kill()
            await asyncio.gather(*clients)
            # Whatever had not begun was answered by another engine; what had begun says its end.
            assert outcomes.total() == NUM_CLIENTS * requests
            assert set(outcomes) <= {"answered", "broke off", "cut off"}
            assert outcomes["broke off"] + outcomes["cut off"] <= NUM_CLIENTS
            assert outcomes["answered"] >= NUM_CLIENTS * (requests - 1)
            await made.until(WorkerState.UNHEALTHY, killed, hung)
            assert made.worker(slow).state is WorkerState.READY
            await nothing_is_held(made)
            while hung.num_left < len(hung.asked):
                await asyncio.sleep(0.01)  # no request is still open at the engine

            # All recover.
            refusing.behaviour = hung.behaviour = "ok"
            hung.health, slow.event_s = 200, 0.0
            port = int(killed.url.rpartition(":")[2])
            port_of_killed.close()
            async with Running(killed, port):
                await made.until(WorkerState.READY)
                outcomes.clear()
                while not all(
                    worker.breaker.state(made.gateway.fleet.clock()) is BreakerState.CLOSED
                    for worker in made.gateway.fleet
                ):
                    await client(made, 8, outcomes.total(), outcomes)
                    await asyncio.sleep(0.02)
                assert set(outcomes) == {"answered"}
                await nothing_is_held(made)

    asyncio.run(run())


def test_an_engine_that_was_started_anew_gets_requests_at_once() -> None:
    """With the usual minutes of health checks and breaker: nobody waits for these."""

    async def run() -> None:
        alone = Stub("a")
        options = {**OPTIONS, "health_check_interval_secs": 60.0, "cb_timeout_duration_secs": 60.0}
        options["worker_startup_check_interval"] = 0.05
        async with bench(alone, **options) as made:
            assert (await made.post()).status_code == 200
            closed = await made.engines[0].kill()
            port = int(alone.url.rpartition(":")[2])
            closed.close()
            breaker = made.worker(alone).breaker
            while breaker.state(made.gateway.fleet.clock()) is BreakerState.CLOSED:
                assert (await made.post()).status_code >= 500
            await made.until(WorkerState.UNHEALTHY, alone)
            async with Running(alone, port):
                await made.until(WorkerState.READY, alone)
                assert (await made.post()).status_code == 200

    asyncio.run(run())


def test_breakers_keep_requests_from_an_engine_that_refuses() -> None:
    async def run() -> None:
        stubs = [Stub(name) for name in "abcd"]
        stubs[0].behaviour = 500
        options = OPTIONS | {"cb_timeout_duration_secs": 60.0}
        outcomes: Counter[str] = Counter()
        async with bench(*stubs, **options) as made:
            await asyncio.gather(*(client(made, 10, seed, outcomes) for seed in range(4)))
            assert outcomes == {"answered": 40}
            # Three in a row open it; those on their way at that moment come on top.
            assert 3 <= len(stubs[0].posts) <= 3 + 4
            assert made.worker(stubs[0]).breaker.state(made.gateway.fleet.clock()) is (
                BreakerState.OPEN
            )

    asyncio.run(run())


def test_engines_are_exchanged_in_the_middle_of_a_load() -> None:
    async def run() -> None:
        old, new = [Stub(name) for name in "ab"], [Stub(name) for name in "cd"]
        for stub in (*old, *new):
            stub.event_s = 0.002
        outcomes: Counter[str] = Counter()
        async with bench(*old, **OPTIONS) as made, Running(new[0]) as one, Running(new[1]) as two:
            clients = [
                asyncio.create_task(client(made, 15, number, outcomes))
                for number in range(NUM_CLIENTS)
            ]
            for index, (stub, engine) in enumerate(((new[0], one), (new[1], two))):
                while outcomes.total() < 20 * (index + 1):
                    await asyncio.sleep(0.002)
                stub.url = engine.url
                await made.client.post("/workers", json={"url": engine.url})
                await made.until(WorkerState.READY, stub)
                id_ = made.worker(old[index]).id
                await made.client.delete(f"/workers/{id_}")
                while (await made.client.get(f"/workers/{id_}")).status_code != 404:
                    await asyncio.sleep(0.002)
            counts = [len(stub.posts) for stub in old]
            await asyncio.gather(*clients)
            # Requests that an engine had begun ended there, and it got no more.
            assert outcomes == {"answered": NUM_CLIENTS * 15}
            assert [len(stub.posts) for stub in old] == counts
            assert sum(len(stub.posts) for stub in (*old, *new)) == outcomes.total()
            assert all(stub.posts for stub in new)
            await nothing_is_held(made)

    asyncio.run(run())


def test_all_engines_gone_is_a_clear_error() -> None:
    async def run() -> None:
        async with bench(Stub("a"), Stub("b"), retry_max_retries=1) as made:
            for engine in made.engines:
                (await engine.kill()).close()
            answer = await made.post()
            assert answer.status_code == 502
            assert "no connection to the worker" in answer.json()["message"]
            assert made.num_open() == 0

    asyncio.run(run())


def test_clients_that_leave_leave_nothing_behind() -> None:
    async def run() -> None:
        stubs = [Stub(name) for name in "ab"]
        for stub in stubs:
            stub.behaviour = "hang"
        async with bench(*stubs, max_concurrent_requests=8, queue_size=100) as made:
            posts = [asyncio.create_task(made.post(stream=bool(n % 2))) for n in range(30)]
            while made.gateway.gate.num_waiting < 22:
                await asyncio.sleep(0.005)
            for post in posts:
                post.cancel()
            await asyncio.gather(*posts, return_exceptions=True)
            await nothing_is_held(made)
            while sum(stub.num_left for stub in stubs) < sum(len(stub.posts) for stub in stubs):
                await asyncio.sleep(0.01)

    asyncio.run(run())
