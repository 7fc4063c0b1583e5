"""Where cached tokens came from, told to those who ask for it."""

from __future__ import annotations

import pytest

WANTS = {"return_cached_tokens_details": True, "max_tokens": 5}
ROUTES = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, 1),
    ("/v1/completions", {"prompt": "Hi"}, 1),
    ("/v1/completions", {"prompt": ["Hi", "Ho"], "n": 2}, 2),
]


@pytest.mark.parametrize(("path", "ask", "num_prompts"), ROUTES)
def test_an_answer_tells_each_prompts_cached_tokens_by_tier(api, engine, path, ask, num_prompts):
    engine.num_cached_tokens, engine.tier_tokens = 9, (3, 2)
    body = api.post(path, {**ask, **WANTS}).json()
    details = body["sglext"]["cached_tokens_details"]
    assert details == {
        "device": 4 * num_prompts, "host": 3 * num_prompts, "storage": 2 * num_prompts
    }  # fmt: skip
    told = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert sum(details.values()) == told == 9 * num_prompts
    assert "sglext" not in api.post(path, ask).json()


@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize(("path", "ask", "num_prompts"), ROUTES)
def test_a_stream_tells_it_once_after_all_choices_and_before_the_usage(
    api, engine, events, path, ask, num_prompts, has_usage
):
    engine.num_cached_tokens, engine.tier_tokens = 9, (3, 2)
    options = {"stream_options": {"include_usage": True}} if has_usage else {}
    got = events(api.post(path, {**ask, **WANTS, **options, "stream": True}).text)
    (at,) = (index for index, event in enumerate(got) if "sglext" in event)
    assert got[at]["choices"] == []
    assert got[at]["sglext"]["cached_tokens_details"]["host"] == 3 * num_prompts
    assert at == len(got) - 1 - has_usage
    assert not has_usage or got[-1]["usage"]["completion_tokens"]
    plain = events(api.post(path, {**ask, **options, "stream": True}).text)
    assert not any("sglext" in event for event in plain)


@pytest.mark.parametrize("value", ["\x00" * 100, 7, {"a": "\x00" * 50}, [[[]]]], ids=type)
@pytest.mark.parametrize(("path", "ask", "num_prompts"), ROUTES[:2])
def test_what_is_no_yes_or_no_is_refused(api, path, ask, num_prompts, value):
    answer = api.post(path, {**ask, "return_cached_tokens_details": value})
    assert answer.status_code == 400
    assert "return_cached_tokens_details" in answer.json()["message"]
