"""Several engines as one, against clients whose engines are played by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest

from sapwood.base.errors import EngineUnavailable
from sapwood.engine.balance import RoundRobin
from sapwood.engine.client import AsyncEngineClient
from sapwood.engine.replicas import ReplicatedClient
from sapwood.schema.output import (
    CacheFlushed,
    CallDone,
    EngineReady,
    EngineStatus,
    Finish,
    PoolUse,
    RequestOutput,
    Speculated,
    StepOutputs,
    total_status,
)
from sapwood.schema.request import (
    Abort,
    EngineInput,
    FlushCache,
    FreezeGc,
    Generate,
    GetStatus,
    LoadAdapter,
    RequestOptions,
    StartProfile,
    StopProfile,
    UnloadAdapter,
)

READY = EngineReady(context_length=64, max_total_tokens=256, page_size=4, notes=[])
STATUS = {one.name: 0 for one in msgspec.structs.fields(EngineStatus) if one.required}


class Engine:
    """An engine that does at once what it is told; requests wait for `finish`.

    bad  paths of adapters that it refuses
    """

    def __init__(self) -> None:
        self.sent: list[EngineInput] = []
        self.adapters: dict[str, str] = {}
        self.bad: set[str] = set()
        self.is_busy = False
        self.client = AsyncEngineClient(self)

    def send(self, message: EngineInput) -> None:
        self.sent.append(message)
        match message:
            case LoadAdapter():
                done = message.path not in self.bad
                if done:
                    self.adapters[message.adapter_id] = message.path
                answer = CallDone(message.call_id, done, "loaded" if done else "it is no adapter")
            case UnloadAdapter():
                answer = CallDone(message.call_id, True, str(self.adapters.pop(message.adapter_id)))
            case FlushCache():
                answer = CacheFlushed(message.call_id, not self.is_busy, "as told")
            case GetStatus():
                answer = EngineStatus(**STATUS | {"call_id": message.call_id, "num_running": 3})
            case StartProfile() | StopProfile() | FreezeGc():
                answer = CallDone(message.call_id, True, "as told")
            case _:
                return
        asyncio.get_running_loop().call_soon(self.client.deliver, answer)

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]

    def finish(self, request_id: str) -> None:
        output = RequestOutput(
            request_id=request_id,
            token_ids=[7],
            num_prompt_tokens=2,
            finish=Finish(kind="length"),
        )
        self.client.deliver(StepOutputs([output]))


class Group:
    def __init__(self, count: int = 2, *, ready: bool = True) -> None:
        self.engines = [Engine() for _ in range(count)]
        self.client = ReplicatedClient([one.client for one in self.engines], RoundRobin())
        for rank in range(count if ready else 0):
            self.get_ready(rank)

    def get_ready(self, rank: int) -> None:
        self.engines[rank].client.deliver(READY)
        self.client.join(rank)

    def die(self, rank: int) -> None:
        self.client.leave(rank)
        self.engines[rank].client.fail("it was killed")

    def restart(self, rank: int) -> None:
        engine = self.engines[rank]
        engine.sent.clear()
        engine.adapters.clear()
        engine.client.restart(engine, "restarting")
        self.get_ready(rank)


def ask(request_id: str, **options: Any) -> Generate:
    return Generate(request_id=request_id, prompt_ids=[1, 2], options=RequestOptions(**options))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def read(group: Group, request_id: str, **options: Any) -> RequestOutput:
    *_, last = [one async for one in group.client.generate(ask(request_id, **options))]
    return last


def test_requests_go_to_one_replica_each_and_all_end():
    async def work() -> None:
        group = Group(3)
        readers = [asyncio.create_task(read(group, f"r{i}")) for i in range(6)]
        await settle()
        assert [len(engine.of(Generate)) for engine in group.engines] == [2, 2, 2]
        for engine in group.engines:
            for request in engine.of(Generate):
                engine.finish(request.request_id)
        ends = await asyncio.gather(*readers)
        assert Counter(one.finish.kind for one in ends) == {"length": 6}
        assert not group.client._placed

    run(work())


def test_a_request_may_name_its_replica():
    async def work() -> None:
        group = Group()
        readers = [
            asyncio.create_task(read(group, f"r{i}", data_parallel_rank=1)) for i in range(3)
        ]
        await settle()
        assert [len(engine.of(Generate)) for engine in group.engines] == [0, 3]
        group.die(1)
        for end in await asyncio.gather(*readers):
            assert (end.finish.kind, end.finish.status) == ("error", 503)
        refused = await read(group, "late", data_parallel_rank=1)
        assert "data_parallel_rank is 1" in refused.finish.message
        assert refused.finish.status == 503

    run(work())


def test_an_abort_and_a_reader_that_leaves_reach_the_right_replica():
    async def work() -> None:
        group = Group()
        readers = [asyncio.create_task(read(group, f"r{i}")) for i in range(2)]
        await settle()
        await group.client.abort("r1")
        await group.client.abort("unknown")
        readers[0].cancel()
        await settle()
        assert [engine.of(Abort) for engine in group.engines] == [[Abort("r0")], [Abort("r1")]]
        readers[1].cancel()

    run(work())


def test_it_serves_when_all_are_ready_and_then_while_one_is():
    async def work() -> None:
        group = Group(ready=False)
        assert group.client.unavailable_reason == "the engine is starting"
        group.get_ready(0)
        assert group.client.unavailable_reason == "the engine is starting"
        group.get_ready(1)
        assert group.client.unavailable_reason is None
        group.die(0)
        assert group.client.unavailable_reason is None
        reader = asyncio.create_task(read(group, "r"))
        await settle()
        group.die(1)
        assert (await reader).finish.message == "it was killed"
        assert group.client.unavailable_reason == "it was killed"
        with pytest.raises(EngineUnavailable):
            await group.client.status()
        assert (await read(group, "late")).finish.status == 503
        group.restart(0)
        assert "killed" in str(group.engines[1].client.unavailable_reason)
        assert group.client.unavailable_reason is None

    run(work())


def test_calls_reach_all_that_serve():
    async def work() -> None:
        group = Group(3)
        group.die(2)
        assert (await group.client.status()).num_running == 6
        assert (await group.client.flush_cache()).done
        group.engines[1].is_busy = True
        flushed = await group.client.flush_cache()
        assert not flushed.done
        assert "replica 1" in flushed.message
        await group.client.start_profile(StartProfile(call_id="", folder="f", name="p"))
        names = [engine.of(StartProfile)[0].name for engine in group.engines[:2]]
        assert names == ["p-dp0", "p-dp1"]
        for call in (group.client.stop_profile, group.client.freeze_gc):
            assert (await call()).message == "as told"

    run(work())


def test_an_adapter_is_loaded_everywhere_or_nowhere():
    async def work() -> None:
        group = Group()
        assert (await group.client.load_adapter("a", "/good")).done
        assert [engine.adapters for engine in group.engines] == [{"a": "/good"}] * 2
        group.engines[1].bad = {"/bad"}
        done = await group.client.load_adapter("b", "/bad")
        assert not done.done
        assert "replica 1: it is no adapter" in done.message
        assert [engine.adapters for engine in group.engines] == [{"a": "/good"}] * 2
        await group.client.unload_adapter("a")
        assert [engine.adapters for engine in group.engines] == [{}] * 2

    run(work())


def test_a_replica_that_returns_gets_the_adapters_before_any_request():
    async def work() -> None:
        group = Group()
        await group.client.load_adapter("a", "/a")
        await group.client.load_adapter("b", "/b")
        group.die(0)
        await group.client.load_adapter("c", "/c")
        group.engines[0].bad = {"/b"}
        group.restart(0)
        reader = asyncio.create_task(read(group, "early"))
        await settle()
        assert not group.engines[0].of(Generate)
        assert group.engines[0].adapters == {"a": "/a", "c": "/c"}
        # Nor does it get requests for the one that it could not load.
        readers = [asyncio.create_task(read(group, f"b{i}", adapter="b")) for i in range(3)]
        readers += [asyncio.create_task(read(group, f"a{i}", adapter="a")) for i in range(4)]
        await settle()
        assert {one.options.adapter for one in group.engines[0].of(Generate)} == {"a"}
        await group.client.unload_adapter("b")
        for one in [reader, *readers]:
            one.cancel()

    run(work())


def test_statuses_add_up():
    def status(**fields: Any) -> EngineStatus:
        return EngineStatus(**STATUS | fields)

    total = total_status(
        [
            status(
                num_running=1,
                new_token_ratio=0.2,
                speculated=Speculated(num_steps=4, num_drafted=8, num_accepted=2),
                pools=(PoolUse(num_free=1, num_leased=2), PoolUse(num_free=3, num_leased=4)),
                routing_key_all_counts=(1, 2),
            ),
            status(
                num_running=2,
                new_token_ratio=0.4,
                speculated=Speculated(num_steps=6, num_drafted=8, num_accepted=8),
                pools=(PoolUse(num_free=10, num_leased=20), PoolUse(num_free=30, num_leased=40)),
                routing_key_all_counts=(5,),
            ),
        ]
    )
    assert total.num_running == 3
    assert total.new_token_ratio == pytest.approx(0.3)
    assert total.speculated == Speculated(num_steps=10, num_drafted=16, num_accepted=10)
    assert total.pools == (PoolUse(num_free=11, num_leased=22), PoolUse(num_free=33, num_leased=44))
    assert total.routing_key_all_counts == (1, 2, 5)
    assert total.adapters is None
