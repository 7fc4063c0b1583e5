import json

import pytest

from sapwood.bench.dialects import DIALECTS, Asked, Usage
from sapwood.bench.http_stream import HttpError
from sapwood.bench.workloads.workload import BenchRequest

IDS = BenchRequest(prompt=(5, 6, 7), num_prompt_tokens=3, num_output_tokens=9)
TEXT = BenchRequest(prompt="one two", num_prompt_tokens=2, num_output_tokens=9)
FORCED = Asked(model="m", temperature=0.0, ignore_eos=True, extra={"priority": 3})
PLAIN = Asked(model=None, temperature=0.5, ignore_eos=False, extra={})


def read(name, *events):
    dialect = DIALECTS.get(name)()
    return [dialect.read(json.dumps(event).encode()) for event in events]


def test_completions_force_the_length():
    dialect = DIALECTS.get("completions")()
    assert json.loads(json.dumps(dialect.body(IDS, FORCED))) == {
        "prompt": [5, 6, 7],
        "model": "m",
        "max_tokens": 9,
        "min_tokens": 9,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "priority": 3,
    }


@pytest.mark.parametrize("name", ["completions", "chat"])
def test_nothing_beyond_the_standard_unless_asked(name):
    body = DIALECTS.get(name)().body(TEXT, PLAIN)
    standard = {"prompt", "messages", "max_tokens", "temperature", "stream", "stream_options"}
    assert set(body) <= standard


def test_chat_sends_one_user_message():
    body = DIALECTS.get("chat")().body(TEXT, FORCED)
    assert body["messages"] == [{"role": "user", "content": "one two"}]


def test_native_body():
    dialect = DIALECTS.get("native")()
    assert dialect.path == "/generate"
    body = dialect.body(IDS, FORCED)
    assert body == {
        "input_ids": (5, 6, 7),
        "sampling_params": {
            "max_new_tokens": 9,
            "min_new_tokens": 9,
            "ignore_eos": True,
            "temperature": 0.0,
        },
        "stream": True,
        "priority": 3,
    }
    assert dialect.body(TEXT, PLAIN)["text"] == "one two"
    assert dialect.body(TEXT, PLAIN)["sampling_params"] == {
        "max_new_tokens": 9,
        "temperature": 0.5,
    }


def test_completions_events():
    first, held_back, last, usage = read(
        "completions",
        {"choices": [{"text": "a", "finish_reason": None}], "usage": None},
        {"choices": [{"text": "", "finish_reason": None}]},
        {"choices": [{"text": "", "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    )
    assert first.has_token
    assert held_back.has_token
    assert not last.has_token
    assert last.finish == "length"
    assert not usage.has_token
    assert usage.usage == Usage(num_prompt_tokens=3, num_output_tokens=2)


def test_a_role_is_no_token():
    role, text, thought, finish = read(
        "chat",
        {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    )
    assert [event.has_token for event in (role, text, thought, finish)] == [
        False,
        True,
        True,
        False,
    ]


def test_cached_tokens_are_read():
    (event,) = read(
        "chat",
        {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 64}}},
    )
    assert event.usage == Usage(num_cached_tokens=64)


def test_native_counts_tell_tokens_from_repeated_text():
    meta = {"prompt_tokens": 3, "cached_tokens": 1}
    first, second, finish = read(
        "native",
        {"text": "a", "meta_info": {**meta, "completion_tokens": 1, "finish_reason": None}},
        {"text": "ab", "meta_info": {**meta, "completion_tokens": 3, "finish_reason": None}},
        {
            "text": "ab",
            "meta_info": {**meta, "completion_tokens": 3, "finish_reason": {"type": "length"}},
        },
    )
    assert [event.has_token for event in (first, second, finish)] == [True, True, False]
    assert finish.finish == "length"
    assert finish.usage == Usage(num_prompt_tokens=3, num_output_tokens=3, num_cached_tokens=1)


@pytest.mark.parametrize(
    ("name", "event", "message"),
    [
        ("completions", {"error": {"message": "engine died"}}, "engine died"),
        ("chat", {"error": "plain"}, "plain"),
        ("native", {"error": {"message": "engine died"}}, "engine died"),
        (
            "native",
            {"meta_info": {"finish_reason": {"type": "abort", "message": "drained"}}},
            "abort: drained",
        ),
        ("completions", {"choices": 5}, "not of this dialect"),
        ("native", {"meta_info": 5}, "not of this dialect"),
    ],
)
def test_failures_inside_a_stream_are_failures(name, event, message):
    with pytest.raises(HttpError, match=message):
        read(name, event)
