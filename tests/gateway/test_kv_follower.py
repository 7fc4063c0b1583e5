"""A gateway that follows engines' KV events over real sockets."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from sapwood.base.errors import ConfigError
from sapwood.gateway.kv_watch import labelled, told
from sapwood.gateway.worker import WorkerState
from sapwood.memory.kv_publisher import KVPublisher
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.kv_events import BlockRemoved, BlockStored, KVEventsConfig
from tests.gateway.stubs import Bench, Stub, _json, bench
from tests.memory.event_follower import names_of

PROMPT = list(range(64))
NAMES = names_of("", array("I", PROMPT).tobytes(), 16)


class Publishing(Stub):
    """A stub that says in /server_info where its events are, and publishes them."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self.config = {
            "publisher": "zmq",
            "endpoint": f"ipc://{folder}/{name}",
            "replay_endpoint": f"ipc://{folder}/{name}-again",
        }
        self.begin()

    def begin(self) -> None:
        self.publisher = KVPublisher(KVEventsConfig(**self.config))

    def store(self, names: list[int]) -> None:
        for at, name in enumerate(names):
            ids = PROMPT[4 * at : 4 * at + 4]
            self.publisher.put(BlockStored([name], None, ids, 4, None, "GPU"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/server_info":
            await _json(send, {"kv_events_config": json.dumps(self.config), "dp_size": 1})
        else:
            await super().__call__(scope, receive, send)


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[Publishing]]:
    made = [Publishing(name, tmp_path) for name in ("a", "b")]
    yield made
    for one in made:
        one.publisher.close()


async def known(made: Bench, engine: Stub, num_pages: int) -> None:
    watch = made.gateway._kv_watch
    while watch.follower.known.num_pages(made.worker(engine).id) != num_pages:
        await asyncio.sleep(0.005)


async def asked(made: Bench, **fields: object) -> str:
    answer = await made.post("/generate", **fields)
    return str(answer.json()["worker"])


def test_requests_go_where_their_pages_are(engines: list[Publishing]) -> None:
    async def go() -> None:
        one, two = engines
        two.store(NAMES)  # before the gateway begins: it asks for these again
        async with bench(*engines, policy="cache_aware", follow_kv_events=True) as made:
            await known(made, two, len(NAMES))
            for _ in range(3):
                assert await asked(made, input_ids=PROMPT) == "b"
            one.store(NAMES)
            two.publisher.put(BlockRemoved(NAMES[4:]))
            await known(made, one, len(NAMES))
            await known(made, two, 4)
            assert await asked(made, input_ids=PROMPT) == "a"
            await known_by_metrics(made)

            two.publisher.close()  # the engine starts anew, and its numbers too
            two.begin()
            two.store(NAMES[:6])
            await known(made, two, 6)

    asyncio.run(go())


async def known_by_metrics(made: Bench) -> None:
    text = made.gateway.metrics.exposition().decode()
    assert f'smg_worker_kv_pages{{worker="{made.stubs[0].url}"}} 16.0' in text
    assert "smg_kv_event_gaps 0.0" in text


def test_a_worker_that_is_gone_is_not_followed(engines: list[Publishing]) -> None:
    async def go() -> None:
        one = engines[0]
        one.store(NAMES)
        async with bench(*engines, policy="cache_aware", follow_kv_events=True) as made:
            await known(made, one, len(NAMES))
            id_ = made.worker(one).id
            made.gateway.fleet.remove(id_)
            while id_ in {worker.id for worker in made.gateway.fleet}:
                await asyncio.sleep(0.005)
            assert not made.gateway._kv_watch.follower.known.follows_all([id_])
            assert await asked(made, input_ids=PROMPT) == "b"

    asyncio.run(go())


def test_an_engine_that_tells_nothing_is_served_as_before(tmp_path: Path) -> None:
    async def go() -> None:
        stubs = [Stub("a"), Stub("b")]
        async with bench(*stubs, policy="cache_aware", follow_kv_events=True) as made:
            await made.until(WorkerState.READY)
            assert await asked(made, input_ids=PROMPT) in ("a", "b")

    asyncio.run(go())


def test_endpoints_that_an_engine_tells() -> None:
    events = {"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:6557"}
    info = json.dumps({"kv_events_config": json.dumps(events), "dp_size": 2}).encode()
    assert told(info, "10.0.0.7") == [
        ("tcp://10.0.0.7:5557", "tcp://10.0.0.7:6557"),
        ("tcp://10.0.0.7:5558", "tcp://10.0.0.7:6558"),
    ]
    assert told(b"[]", "h") == told(b"{", "h") == told(b'{"kv_events_config": null}', "h") == []
    with pytest.raises(ConfigError, match="no endpoint"):
        told(b'{"kv_events_config": "{\\"publisher\\":\\"zmq\\",\\"endpoint\\":\\"x\\"}"}', "h")


def test_endpoints_by_labels() -> None:
    assert labelled({}) is None
    labels = {"kv_events_endpoint": "tcp://h:1, tcp://h:2"}
    assert labelled(labels) == [("tcp://h:1", None), ("tcp://h:2", None)]
    with pytest.raises(ConfigError, match="name 2 and 1"):
        labelled({**labels, "kv_events_replay_endpoint": "tcp://h:3"})


def test_it_needs_the_policy() -> None:
    with pytest.raises(ConfigError, match="without the policy cache_aware"):
        GatewayConfig(policy="random", follow_kv_events=True)
