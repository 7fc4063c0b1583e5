import msgspec
import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    KVEventsConfig,
    is_bound,
    of_rank,
)


class OldStored(msgspec.Struct, array_like=True, tag="BlockStored"):
    """As a reader of before there were tiers knows the event."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None


def test_events_are_tagged_arrays() -> None:
    events = [BlockStored([1], None, [5, 6], 2, None, "GPU"), BlockRemoved([1]), AllBlocksCleared()]
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(KVEventBatch(1.5, events, 0)))
    stored = ["BlockStored", [1], None, [5, 6], 2, None, "GPU"]
    assert told == [1.5, [stored, ["BlockRemoved", [1], None], ["AllBlocksCleared"]], 0]
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(events[0]), type=OldStored)
    assert old.token_ids == [5, 6]


def test_the_configuration_is_json() -> None:
    assert not KVEventsConfig.parse(None).is_on
    assert not KVEventsConfig.parse("{}").is_on
    config = KVEventsConfig.parse('{"publisher": "zmq", "topic": "kv", "replay_endpoint": null}')
    assert (config.is_on, config.topic, config.endpoint) == (True, "kv", "tcp://*:5557")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "must be a JSON object"),
        ('{"publisher": "kafka"}', "one of null, zmq"),
        ('{"endpiont": ""}', "knows only publisher, endpoint"),
        ('{"hwm": true}', "a number from 1"),
        ('{"topic": 5}', "must have a text"),
        ('{"endpoint": "udp://*:1"}', "no endpoint of KV events"),
        ('{"endpoint": "tcp://*"}', "a host and a port"),
        ('{"replay_endpoint": "tcp://*:5557"}', "the same endpoint twice"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{why}"):
        MemoryConfig(kv_events_config=text)


def test_events_need_a_prefix_cache() -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        MemoryConfig(kv_events_config='{"publisher": "zmq"}', disable_radix_cache=True)


def test_each_replica_has_an_endpoint_of_its_own() -> None:
    assert of_rank("tcp://*:5557", 2) == "tcp://*:5559"
    assert of_rank("tcp://[::]:5557", 0) == "tcp://[::]:5557"
    assert of_rank("ipc:///tmp/a", 1) == "ipc:///tmp/a_dp1"
    with pytest.raises(ConfigError, match="below 65536"):
        of_rank("tcp://*:65535", 1)


def test_what_is_bound() -> None:
    bound = ("tcp://*:1", "tcp://[::]:1", "ipc:///tmp/a", "inproc://a")
    assert all(map(is_bound, bound))
    assert not is_bound("tcp://10.0.0.1:5557")
