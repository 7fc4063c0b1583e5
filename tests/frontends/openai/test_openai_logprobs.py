"""Log probabilities of chat completions and completions."""

from __future__ import annotations

from itertools import chain

import pytest

from tests.frontends.scored import logprob_of

MESSAGES = [{"role": "user", "content": "Hi"}]
REPLY = "Hello, wörld!"
EOS_NAME = "<|im_end|>"


def chat(api, **fields):
    response = api.post("/v1/chat/completions", {"messages": MESSAGES, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def complete(api, prompt="Hi ü", **fields):
    response = api.post("/v1/completions", {"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def approx(token_ids):
    return [pytest.approx(logprob_of(one)) for one in token_ids]


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": False}, {"logprobs": False, "top_logprobs": 5}]
)
def test_none_where_none_are_wanted(api, fields):
    [choice] = chat(api, **fields)
    assert choice["logprobs"] is None


def test_a_chat_lists_every_output_token(api, tokenizer):
    [choice] = chat(api, logprobs=True, top_logprobs=2)
    content = choice["logprobs"]["content"]
    token_ids = tokenizer.encode(REPLY + EOS_NAME)
    assert [one["logprob"] for one in content] == approx(token_ids)
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == REPLY + EOS_NAME
    # A part of a character has bytes of its own, and a name that tells it apart.
    assert [one["token"] for one in content][8:10] == ["bytes:\\xc3", "bytes:\\xb6"]
    names = [tokenizer.decode([one]) for one in (0, 1)]
    for one in content:
        assert [likely["token"] for likely in one["top_logprobs"]] == names
        assert [likely["logprob"] for likely in one["top_logprobs"]] == approx([0, 1])


def test_a_chat_without_top_logprobs_lists_none(api):
    [choice] = chat(api, logprobs=True)
    assert all(one["top_logprobs"] == [] for one in choice["logprobs"]["content"])


def test_a_completion_has_four_lists(api, tokenizer):
    [choice] = complete(api, logprobs=1, max_tokens=20)
    logprobs = choice["logprobs"]
    token_ids = tokenizer.encode(REPLY + EOS_NAME)
    assert logprobs["token_logprobs"] == approx(token_ids)
    # "ö" is two tokens, which begin at the same character; the end token has no text.
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13]
    assert logprobs["tokens"][:3] == ["H", "e", "l"]
    first_name = tokenizer.decode([0])
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top == {first_name: 0.0, token: logprob}


def test_zero_means_only_the_tokens_themselves(api):
    [choice] = complete(api, logprobs=0)
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 15
    assert choice["logprobs"]["top_logprobs"] is None


def test_an_echo_has_those_of_the_prompt(api, tokenizer):
    prompt = "Hi ü"
    [choice] = complete(api, prompt, logprobs=1, echo=True, max_tokens=2)
    logprobs = choice["logprobs"]
    assert choice["text"] == prompt + "He"
    token_ids = tokenizer.encode(prompt + "He")
    assert logprobs["token_logprobs"] == [None, *approx(token_ids[1:])]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 3, 4, 5]
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == 7


def test_a_prompt_alone_can_be_scored(api, engine):
    complete(api, logprobs=0, echo=True, max_tokens=0)
    request = engine.submitted[-1]
    assert request.options.sampling.max_new_tokens == 0
    assert request.options.logprobs.prompt_start == 0


def test_what_a_stop_string_cuts_off_is_still_listed(api):
    """The tokens are those that usage counts."""
    response = api.post("/v1/completions", {"prompt": "x", "logprobs": 0, "stop": "o, w"}).json()
    [choice] = response["choices"]
    assert choice["text"] == "Hell"
    assert "".join(choice["logprobs"]["tokens"]) == "Hello, w"
    assert response["usage"]["completion_tokens"] == 8


def streamed(api, events, path, body):
    return events(api.post(path, {**body, "stream": True}).text)


def test_a_chats_stream_brings_each_token_once(api, events):
    body = {"messages": MESSAGES, "logprobs": True}
    got = streamed(api, events, "/v1/chat/completions", body)
    tokens, text = b"", ""
    for event in got:
        [choice] = event["choices"]
        text += choice["delta"].get("content") or ""
        if choice["logprobs"] is not None:
            tokens += b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"])
    assert text == REPLY
    assert tokens.decode() == REPLY + EOS_NAME
    assert got[0]["choices"][0]["logprobs"] is None
    assert got[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "matched_stop": 257,
    }


def test_a_chunk_that_only_flushes_text_has_null(api, events, engine):
    """The abort brings the text that was held back, and no token."""
    engine.reply = "one <sto"
    engine.failure = engine.failure.__class__(kind="abort")
    engine.fail_after = 8
    body = {"prompt": "x", "logprobs": 0, "stop": "<stop>", "max_tokens": 20}
    got = streamed(api, events, "/v1/completions", body)
    choices = [event["choices"][0] for event in got]
    assert "".join(choice["text"] for choice in choices) == "one <sto"
    assert choices[-1]["text"] == "<sto"
    assert choices[-1]["logprobs"] is None
    listed = [choice["logprobs"]["tokens"] for choice in choices[:-1]]
    assert [*chain(*listed)] == list("one <sto")


def test_a_completions_stream_equals_the_whole(api, events):
    body = {"prompt": ["ab", "c"], "logprobs": 2, "echo": True, "n": 2, "temperature": 1}
    whole = complete(api, **body)
    got = streamed(api, events, "/v1/completions", body)
    for index, choice in enumerate(whole):
        parts = [one for event in got for one in event["choices"] if one["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, expected in choice["logprobs"].items():
            lists = [part["logprobs"][name] for part in parts if part["logprobs"] is not None]
            assert [*chain(*lists)] == expected
