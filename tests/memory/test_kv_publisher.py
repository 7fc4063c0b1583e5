import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from sapwood.base.errors import ConfigError
from sapwood.memory.kv_publisher import KVPublisher
from sapwood.schema.kv_events import BlockRemoved, KVEventsConfig

WAIT_MS = 5000


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, 0)
        context.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        yield context


def config(folder, **options) -> KVEventsConfig:
    given = {
        "publisher": "zmq",
        "endpoint": f"ipc://{folder}/events",
        "replay_endpoint": f"ipc://{folder}/replay",
    }
    return KVEventsConfig(**{**given, **options})


def test_frames_as_sglangs(tmp_path, context) -> None:
    publisher = KVPublisher(config(tmp_path, topic="kv"), rank=3)
    with context.socket(zmq.SUB) as events:
        events.connect(f"ipc://{tmp_path}/events_dp3")
        events.subscribe(b"kv")
        time.sleep(0.2)  # a subscription is not acknowledged
        publisher.put(BlockRemoved([7], "GPU"))
        topic, number, payload = events.recv_multipart()
        assert (topic, number) == (b"kv", (1).to_bytes(8, "big"))
        _, told, rank = msgspec.msgpack.decode(payload)
        assert (told, rank) == ([["BlockRemoved", [7], "GPU"]], 3)
    publisher.close()
    assert (publisher.num_published, publisher.num_dropped) == (2, 0)


def test_messages_are_sent_again_from_the_asked_number(tmp_path, context) -> None:
    publisher = KVPublisher(config(tmp_path, buffer_steps=3))
    for name in range(1, 6):
        publisher.put(BlockRemoved([name]))
        until(lambda expected=name + 1: publisher.num_published == expected)
    with context.socket(zmq.DEALER) as replay, context.socket(zmq.DEALER) as rude:
        for asker in (rude, replay):
            asker.connect(f"ipc://{tmp_path}/replay")
        rude.send_multipart([b"", bytes(1000)])  # ends its connection
        replay.send_multipart([b"", b"no number"])
        for start, expected in ((0, [3, 4, 5]), (4, [4, 5]), (6, [])):
            replay.send_multipart([b"", start.to_bytes(8, "big")])
            found = []
            while (answer := replay.recv_multipart())[1] != b"\xff" * 8:
                found.append((int.from_bytes(answer[1], "big"), *removed(answer[2])))
            assert found == [(number, number) for number in expected]
            assert answer == [b"", b"\xff" * 8, b""]
    publisher.close()


def test_without_room_events_are_dropped_counted_and_leave_a_gap(tmp_path, context) -> None:
    publisher = KVPublisher(config(tmp_path, max_queue_size=2))
    until(lambda: publisher.num_published == 1)
    for name in range(1, 1001):
        publisher.put(BlockRemoved([name]))  # faster than the thread, which gathers for a while
    assert publisher.num_dropped > 0
    until(lambda: publisher.num_published + publisher.num_dropped == 1001)
    publisher.put(BlockRemoved([2000]))
    until(lambda: publisher.num_published + publisher.num_dropped == 1002)
    with context.socket(zmq.DEALER) as replay:
        replay.connect(f"ipc://{tmp_path}/replay")
        replay.send_multipart([b"", bytes(8)])
        numbers = []
        while (answer := replay.recv_multipart())[1] != b"\xff" * 8:
            numbers.append(int.from_bytes(answer[1], "big"))
    assert numbers != list(range(len(numbers))), "nobody could know that events are missing"
    publisher.close()


def test_a_taken_endpoint_is_refused_by_name(context) -> None:
    with context.socket(zmq.PUB) as other:
        port = other.bind_to_random_port("tcp://*")
        asked = KVEventsConfig(publisher="zmq", endpoint=f"tcp://*:{port}")
        with pytest.raises(ConfigError, match=f":{port} of --kv-events-config cannot be used"):
            KVPublisher(asked)


def removed(payload: bytes) -> list[int]:
    _, events, _ = msgspec.msgpack.decode(payload)
    return [name for event in events for name in event[1]]


def until(is_so) -> None:
    deadline_s = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
