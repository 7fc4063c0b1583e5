"""The official client against a server whose engine answers from a script."""

from __future__ import annotations

import asyncio

import anthropic
import pytest

MESSAGES = [{"role": "user", "content": "Hi"}]
ASK = {"model": "org/tiny", "max_tokens": 50, "messages": MESSAGES}


@pytest.fixture
def client(live):
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def test_message(client, engine):
    engine.num_cached_tokens = 3
    answer = client.messages.create(**ASK, metadata={"user_id": "me"})
    assert answer.content[0].text == "Hello, wörld!"
    assert answer.stop_reason == "end_turn"
    assert answer.usage.cache_read_input_tokens == 3


def test_raw_stream(client):
    kinds = [event.type for event in client.messages.create(**ASK, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_stream_helper(client):
    with client.messages.stream(**ASK, stop_sequences=["!"]) as stream:
        assert "".join(stream.text_stream) == "Hello, wörld"
        final = stream.get_final_message()
    assert final.content[0].text == "Hello, wörld"
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "!")
    assert final.usage.output_tokens == 14


def test_async_stream(live):
    async def ask() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=live.url, api_key="none", max_retries=0) as client,
            client.messages.stream(**ASK) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == "Hello, wörld!"


def test_beta_messages_are_the_same_route(client):
    answer = client.beta.messages.create(**ASK, betas=["some-beta-2025-01-01"])
    assert answer.content[0].text == "Hello, wörld!"


def test_count_tokens(client):
    counted = client.messages.count_tokens(model="org/tiny", messages=MESSAGES, system="Be brief.")
    answer = client.messages.create(**ASK, system="Be brief.")
    assert counted.input_tokens == answer.usage.input_tokens


def test_errors_become_its_exceptions(client, engine):
    with pytest.raises(anthropic.BadRequestError, match="temperature is 2"):
        client.messages.create(**ASK, extra_body={"temperature": 2})
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        client.messages.create(**{**ASK, "model": "claude-x"})
    engine.fail_after = 0
    with pytest.raises(anthropic.APIStatusError, match="out of pages") as refused:
        client.messages.create(**ASK)
    assert refused.value.status_code == 529
    engine.fail_after = 2
    with pytest.raises(anthropic.APIStatusError, match="out of pages"):
        list(client.messages.create(**ASK, stream=True))
