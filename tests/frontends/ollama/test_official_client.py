"""The official client against a server whose engine answers from a script."""

from __future__ import annotations

import asyncio

import ollama
import pytest

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(live):
    with ollama.Client(host=live.url) as client:
        yield client


def test_chat(client):
    answer = client.chat("org/tiny", MESSAGES, options={"seed": 1}, keep_alive="5m")
    assert answer.message.content == "Hello, wörld!"
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "stop", 15)


def test_chat_stream(client):
    chunks = list(client.chat("org/tiny", MESSAGES, stream=True, options={"num_predict": 5}))
    assert "".join(chunk.message.content for chunk in chunks) == "Hello"
    assert [chunk.done for chunk in chunks] == [False] * 5 + [True]
    assert chunks[-1].done_reason == "length"
    assert chunks[-1].total_duration > 0


def test_generate(client):
    assert client.generate("org/tiny", "Hi", system="Be brief.").response == "Hello, wörld!"
    parts = client.generate("org/tiny:latest", "Hi", raw=True, stream=True)
    assert "".join(part.response for part in parts) == "Hello, wörld!"


def test_loading(client):
    assert client.generate("org/tiny").done_reason == "load"
    assert client.chat("org/tiny").done_reason == "load"


def test_async_chat(live):
    async def ask() -> str:
        client = ollama.AsyncClient(host=live.url)
        parts = await client.chat("org/tiny", MESSAGES, stream=True)
        text = "".join([part.message.content async for part in parts])
        await client.close()
        return text

    assert asyncio.run(ask()) == "Hello, wörld!"


def test_models(client):
    [listed] = client.list().models
    assert listed.model == "org/tiny:latest"
    assert listed.modified_at.year == 2023
    shown = client.show(listed.model)
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo["unknown.context_length"] == 1024
    [running] = client.ps().models
    assert running.context_length == 1024
    assert running.expires_at.year == 9999


def test_errors_become_its_exceptions(client, engine):
    with pytest.raises(ollama.ResponseError, match="not served here") as refused:
        client.chat("llama3", MESSAGES)
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="think asks for thinking") as refused:
        client.chat("org/tiny", MESSAGES, think=True)
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="has no place for tools"):
        list(client.chat("org/tiny", MESSAGES, tools=[test_models], stream=True))
    assert client.pull("org/tiny").status == "success"
    for call in (client.pull, client.push, client.create, client.delete):
        with pytest.raises(ollama.ResponseError, match="one model"):
            call("llama3")
    with pytest.raises(ollama.ResponseError, match="one model"):
        client.copy("org/tiny", "other")
    with pytest.raises(ollama.ResponseError, match="embeddings"):
        client.embed("org/tiny", "a text")
    engine.fail_after = 2
    with pytest.raises(ollama.ResponseError, match="out of pages"):
        list(client.chat("org/tiny", MESSAGES, stream=True))
