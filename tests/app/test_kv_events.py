"""An engine publishes what its prefix cache holds."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import zmq

from sapwood import LLM
from sapwood.base.errors import ConfigError
from sapwood.memory.prefix_tree import token_key
from sapwood.schema.kv_events import KVEventBatch
from tests.app.llms import llms_of
from tests.memory.event_follower import EventFollower, names_of
from tests.tiny import save_qwen3

PAGE = 4


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


def events(folder: Path) -> dict[str, object]:
    given = {
        "publisher": "zmq",
        "endpoint": f"ipc://{folder}/events",
        "replay_endpoint": f"ipc://{folder}/replay",
    }
    return {"kv_events_config": json.dumps(given), "page_size": PAGE}


def replayed(folder: Path, llm: LLM) -> EventFollower:
    """Knows what all events of an engine tell."""
    follower = EventFollower(PAGE)
    decode = msgspec.msgpack.Decoder(KVEventBatch).decode
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = 5000
        socket.connect(f"ipc://{folder}/replay")
        num_taken = next_ = 0
        while num_taken < llm.stats().kv_events.num_published or not num_taken:
            socket.send_multipart([b"", next_.to_bytes(8, "big")])
            while (answer := socket.recv_multipart())[2]:
                assert int.from_bytes(answer[1], "big") == next_, "a gap"
                next_ += 1
                for event in decode(answer[2]).events:
                    follower.take(event)
                    num_taken += 1
    return follower


def settled(folder: Path, llm: LLM) -> EventFollower:
    """After the thread has sent what waited."""
    for _ in range(200):
        follower = replayed(folder, llm)
        if len(follower.pages) == llm.stats().num_cached_pages:
            break
    return follower


def test_events_tell_what_the_cache_holds(tmp_path: Path, model_path: Path) -> None:
    with llms_of(model_path, max_total_tokens=128, **events(tmp_path)) as make:
        llm = make()
        sampling = {"max_new_tokens": 6, "temperature": 0.0}
        for start in range(12):  # more than the pool holds, with common beginnings
            prompts = [[1, 2, 3, 4, start, start, 7, number, 9] for number in (20, 21)]
            llm.generate(prompts, sampling)
        follower = settled(tmp_path, llm)
        assert len(follower.pages) == llm.stats().num_cached_pages
        newest = names_of("", token_key([1, 2, 3, 4, 11, 11, 7, 21]), PAGE * 4)
        assert set(newest) <= set(follower.pages)
        assert llm.stats().kv_events.num_dropped == 0
        assert llm.flush_cache()
        assert settled(tmp_path, llm).pages == {}


def test_what_cannot_be_told_is_refused(model_path: Path) -> None:
    asked = {"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}
    with pytest.raises(ConfigError, match="leave room between them"):
        LLM(str(model_path), dp_size=2, kv_events_config=json.dumps(asked))
