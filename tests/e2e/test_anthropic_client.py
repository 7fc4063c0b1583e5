"""The official client of Anthropic's API against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import pytest

from tests.e2e.server import Server

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
# The client itself has no sampling parameters any more, but sends those that it is given like this.
GREEDY = {"extra_body": {"temperature": 0}}


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as one:
        yield one


def text_of(answer: anthropic.types.Message) -> str:
    (block,) = answer.content
    assert block.type == "text"
    return block.text


def test_message(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(
        model=MODEL, max_tokens=30, messages=QUESTION, metadata={"user_id": "me"}, **GREEDY
    )
    assert "Tokyo" in text_of(answer)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", MODEL)
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert 3 < answer.usage.output_tokens <= 30


def test_streamed_message_is_the_same_text(client: anthropic.Anthropic) -> None:
    options = {"model": MODEL, "max_tokens": 30, "messages": QUESTION, **GREEDY}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        parts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(parts) > 3
    assert "".join(parts) == text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in client.messages.create(**options, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_async_stream(server: Server) -> None:
    async def ask() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client,
            client.messages.stream(
                model="default", max_tokens=30, messages=QUESTION, **GREEDY
            ) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert "Tokyo" in asyncio.run(ask())


def test_system_blocks_stop_sequences_and_limits(client: anthropic.Anthropic) -> None:
    counting = [{"role": "user", "content": [{"type": "text", "text": "Count from 1 to 9."}]}]
    options = {"model": MODEL, "messages": counting, **GREEDY}
    system = [{"type": "text", "text": "You count.", "cache_control": {"type": "ephemeral"}}]
    prefilled = {**options, "messages": [*counting, {"role": "assistant", "content": "1, 2, 3,"}]}
    answer = client.messages.create(
        **prefilled, system=system, max_tokens=40, stop_sequences=["6", "five"]
    )
    assert text_of(answer) == " 4, 5, "
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "6")
    short = client.messages.create(**options, max_tokens=3)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)


def test_max_tokens_0_only_fills_the_cache(client: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": "Remember these words for me: " + "apple pear " * 40}]
    options = {"model": MODEL, "messages": messages}
    first = client.messages.create(**options, max_tokens=0)
    assert (text_of(first), first.usage.output_tokens) == ("", 0)
    assert first.stop_reason == "max_tokens"
    again = client.messages.create(**options, max_tokens=1)
    cached = again.usage.cache_read_input_tokens
    assert cached is not None
    assert cached > 60
    assert again.usage.input_tokens + cached == first.usage.input_tokens + (
        first.usage.cache_read_input_tokens or 0
    )


def test_counted_tokens_are_those_of_the_message(client: anthropic.Anthropic) -> None:
    conversation = {"model": MODEL, "messages": QUESTION, "system": "You answer briefly."}
    counted = client.messages.count_tokens(**conversation).input_tokens
    usage = client.messages.create(**conversation, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"extra_body": {"temperature": 1.5}}, "temperature is 1.5"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"extra_body": {"mcp_servers": [{"name": "x"}]}}, "mcp_servers"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "at most 8191"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_a_400_that_names_it(
    client: anthropic.Anthropic, options: dict[str, object], named: str, stream: bool
) -> None:
    asked = {"model": MODEL, "max_tokens": 5, "messages": QUESTION, "stream": stream, **options}
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**asked)
    assert named in str(caught.value)


def test_an_unknown_model_is_a_404(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="claude-x"):
        client.messages.create(model="claude-x", max_tokens=5, messages=QUESTION)


def test_a_stream_that_is_closed_gives_its_pages_back(
    client: anthropic.Anthropic, server: Server
) -> None:
    aborted = server.wait_until_idle()["num_aborted"]
    with client.messages.stream(
        model=MODEL,
        max_tokens=4000,
        messages=[{"role": "user", "content": "Tell me a very long story."}],
    ) as stream:
        next(iter(stream.text_stream))
    counters = server.wait_until_idle()
    assert counters["num_leased_pages"] == 0
    assert counters["num_aborted"] == aborted + 1
