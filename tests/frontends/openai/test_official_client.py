"""The official client against a real server."""

from __future__ import annotations

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model="org/tiny", messages=MESSAGES, seed=1)
    assert answer.choices[0].message.content == "Hello, wörld!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model="org/tiny",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 3, "rid": "mine"},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello, wörld!"
    assert chunks[-1].usage.completion_tokens == 15
    assert chunks[0].id == "mine"


def test_completions(client):
    answer = client.completions.create(model="org/tiny", prompt=["a", "b"], max_tokens=5)
    assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]


def test_completions_stream(client):
    stream = client.completions.create(model="org/tiny", prompt="a", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_logprobs(client):
    answer = client.chat.completions.create(
        model="org/tiny", messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 15
    assert {len(one.top_logprobs) for one in content} == {2}
    answer = client.completions.create(model="org/tiny", prompt="ab", logprobs=1, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens[:3] == ["a", "b", "H"]
    assert logprobs.token_logprobs[0] is None


def test_models(client):
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"


def test_errors_become_its_exceptions(client, engine):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="org/tiny", messages=MESSAGES, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    engine.fail_after = 2
    with pytest.raises(openai.APIError, match="out of pages"):
        list(client.chat.completions.create(model="default", messages=MESSAGES, stream=True))
