"""What several gateways share in a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack

import pytest

from sapwood.app.gateway.assembly import shared_state
from sapwood.base.errors import ConfigError
from sapwood.gateway.worker import WorkerState
from sapwood.http.callers import Caller, Role
from sapwood.http.errors import TooManyRequests
from sapwood.schema.config.gateway import GatewayConfig
from tests.gateway.stubs import Running, Stub, bench
from tests.history.servers import redis_server

shared = pytest.importorskip("sapwood.gateway.shared", reason="the package redis is not installed")
OPTIONS = {"policy": "manual", "share_state": True}
BEN = {"authorization": "Bearer b"}


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


def test_a_key_has_one_worker_at_all_gateways(redis_url: str) -> None:
    async def run() -> None:
        stubs = [Stub(name) for name in "abcd"]
        config = GatewayConfig(redis_url=redis_url, **OPTIONS)
        async with AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(Running(stub)) for stub in stubs]
            urls = " ".join(engine.url for engine in engines)
            for stub, engine in zip(stubs, engines, strict=True):
                stub.url = engine.url
            gateways = []
            for _ in range(2):
                state = await stack.enter_async_context(shared_state(config))
                made = await stack.enter_async_context(
                    bench(
                        wait=False, shared=state, redis_url=redis_url, worker_urls=urls, **OPTIONS
                    )
                )
                made.stubs += stubs
                await made.until(WorkerState.READY)
                gateways.append(made)
            workers = {}
            for number in range(16):
                headers = {"x-smg-routing-key": f"key {number}"}
                told = [(await made.post(headers=headers)).json()["worker"] for made in gateways]
                assert told[0] == told[1]
                workers[number] = told[0]
            assert len(set(workers.values())) > 1
            # A key whose worker is gone moves, at both gateways alike.
            (gone,) = [stub for stub in stubs if stub.name == workers[0]]
            for made in gateways:
                made.gateway.fleet.remove(made.worker(gone).id)
            headers = {"x-smg-routing-key": "key 0"}
            told = [(await made.post(headers=headers)).json()["worker"] for made in gateways]
            assert told[0] == told[1] != gone.name

    asyncio.run(run())


def test_a_caller_has_one_rate_at_all_gateways(redis_url: str) -> None:
    async def run() -> None:
        options = {"rate_limit_per_key": 0.001, "api_key": "b", "share_state": True}
        config = GatewayConfig(redis_url=redis_url, **options)
        async with shared_state(config) as first, shared_state(config) as second:
            caller, other = Caller("ben", Role.USER), Caller("\ud800" * 999, Role.USER)
            await first.take(caller)
            for state in (second, first):
                with pytest.raises(TooManyRequests, match=r"ben may send 0\.001 requests"):
                    await state.take(caller)
            await second.take(other)
            async with bench(Stub("a"), shared=first, redis_url=redis_url, **options) as made:
                statuses = [(await made.post(headers=BEN)).status_code for _ in range(3)]
                assert statuses == [200, 429, 429]

    asyncio.run(run())


def test_a_redis_that_cannot_be_used_is_an_error() -> None:
    async def run() -> None:
        config = GatewayConfig(redis_url="redis://127.0.0.1:1", **OPTIONS)
        with pytest.raises(ConfigError, match="does not answer"):
            async with shared_state(config):
                pass

    asyncio.run(run())


def test_a_redis_that_leaves_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with ExitStack() as server:
            url = server.enter_context(redis_server())
            config = GatewayConfig(redis_url=url, rate_limit_per_key=1e-3, api_key="b", **OPTIONS)
            async with shared_state(config) as state:
                assert await state.settle("k", "a", ["a", "b"]) == "a"
                assert await state.settle("k", "b", ["a", "b"]) == "a"
                assert await state.settle("k", "b", ["b"]) == "b"
                server.close()
                assert await state.settle("k", "a", ["a", "b"]) == "a"
                caller = Caller("ben", Role.USER)
                await state.take(caller)
                with pytest.raises(TooManyRequests):
                    await state.take(caller)
                # It is asked once, and then left alone for a while.
                assert caplog.text.count("does not answer") == 1

    asyncio.run(run())


def test_every_key_is_forgotten_in_the_end(redis_url: str) -> None:
    async def run() -> None:
        config = GatewayConfig(redis_url=redis_url, rate_limit_per_key=9, api_key="b", **OPTIONS)
        async with (
            shared_state(config) as state,
            shared.open_client(redis_url, max_connections=1) as client,
        ):
            await client.flushall()
            await state.take(Caller("ben", Role.USER))
            await state.settle("k" * 5000, "a", ["a"])
            keys = await client.keys("*")
            assert len(keys) == 2
            for key in keys:
                assert len(key) < 64
                assert await client.ttl(key) > 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"share_state": True, "policy": "manual"}, "--redis-url"),
        ({"share_state": True, "redis_url": "redis://x"}, "--policy manual"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        GatewayConfig(**options)
