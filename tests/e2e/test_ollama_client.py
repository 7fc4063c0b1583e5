"""The official client of Ollama's API against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import ollama
import pytest

from tests.e2e.server import Server

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
GREEDY = {"temperature": 0, "num_predict": 30}


@pytest.fixture
def client(server: Server) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as one:
        yield one


def test_chat(client: ollama.Client) -> None:
    answer = client.chat(MODEL, QUESTION, options=GREEDY, keep_alive="5m")
    assert answer.message.role == "assistant"
    assert "Tokyo" in (answer.message.content or "")
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.prompt_eval_count is not None
    assert answer.prompt_eval_count > 10
    assert answer.eval_count is not None
    assert 3 < answer.eval_count <= 30
    parts = (answer.prompt_eval_duration, answer.eval_duration, answer.load_duration)
    assert all(part is not None for part in parts)
    assert answer.total_duration is not None
    assert sum(part or 0 for part in parts) <= answer.total_duration + 2


def test_streamed_chat_is_the_same_text(client: ollama.Client) -> None:
    whole = client.chat(MODEL, QUESTION, options=GREEDY)
    chunks = list(client.chat(MODEL, QUESTION, options=GREEDY, stream=True))
    assert len(chunks) > 3
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].eval_count == whole.eval_count


def test_async_stream(server: Server) -> None:
    async def ask() -> str:
        client = ollama.AsyncClient(host=server.url)
        parts = await client.chat(f"{MODEL}:latest", QUESTION, options=GREEDY, stream=True)
        text = "".join([part.message.content or "" async for part in parts])
        await client.close()
        return text

    assert "Tokyo" in asyncio.run(ask())


def test_generate_with_a_system_message_and_raw(client: ollama.Client) -> None:
    question = "What is the capital of Japan?"
    plain = client.generate(MODEL, question, options=GREEDY)
    assert "Tokyo" in (plain.response or "")
    # What a model of this size makes of a role is chance; that it got it is not.
    system = "You are a very terse pirate who has sailed the seven seas. " * 4
    told = client.generate(MODEL, question, system=system, options=GREEDY)
    assert (told.prompt_eval_count or 0) > (plain.prompt_eval_count or 0) + 10
    parts = client.generate(MODEL, "1, 2, 3, 4,", raw=True, stream=True, options=GREEDY)
    assert "".join(part.response or "" for part in parts).startswith(" 5, 6, 7")


def test_the_model_goes_on_with_its_own_message(client: ollama.Client) -> None:
    counting = [
        {"role": "user", "content": "Count from 1 to 9."},
        {"role": "assistant", "content": "1, 2, 3,"},
    ]
    answer = client.chat(MODEL, counting, options={**GREEDY, "stop": ["6"]})
    assert answer.message.content == " 4, 5, "
    assert answer.done_reason == "stop"


def test_limits_and_seeds(client: ollama.Client) -> None:
    options = {"num_predict": 12, "temperature": 0.9, "top_k": 50, "seed": 7, "num_ctx": 4096}
    first, second = (client.generate(MODEL, "My favourite", options=options) for _ in range(2))
    assert first.response == second.response
    limited = {**GREEDY, "num_predict": 12}
    counted = client.generate(MODEL, "1, 2, 3, 4,", raw=True, options=limited)
    assert (counted.done_reason, counted.eval_count) == ("length", 12)
    nothing = client.generate(MODEL, "My favourite", options={"num_predict": 0})
    assert (nothing.response, nothing.eval_count, nothing.done_reason) == ("", 0, "length")


def test_loading(client: ollama.Client) -> None:
    assert client.generate(MODEL).done_reason == "load"
    assert client.chat(MODEL).done_reason == "load"


def test_models(client: ollama.Client, server: Server) -> None:
    (listed,) = client.list().models
    assert listed.model == f"{MODEL}:latest"
    shown = client.show(listed.model)
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    assert shown.modelinfo["llama.vocab_size"] == 49152
    assert shown.details is not None
    assert shown.details.family == "llama"
    (running,) = client.ps().models
    assert (running.model, running.context_length) == (listed.model, 8192)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"options": {"repeat_last_n": -2}}, "options.repeat_last_n"),
        ({"options": {"top_p": 0.0}}, "top_p"),
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"format": {"type": "no such type"}}, "no such type"),
        ({"think": True}, "think"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"messages": [{"role": "user", "content": "a", "images": [b"x"]}]}, "messages[0].images"),
        (
            {
                "messages": [{"role": "user", "content": "word " * 9000}],
                "options": {"num_ctx": 10**6},
            },
            "at most 8191",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_a_400_that_names_it(
    client: ollama.Client, asked: dict[str, object], named: str, stream: bool
) -> None:
    options = {"model": MODEL, "messages": QUESTION, **asked}
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.chat(**options, stream=True)) if stream else client.chat(**options)
    assert caught.value.status_code == 400
    assert named in caught.value.error


def test_an_unknown_model_is_a_404_and_cannot_be_pulled(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="llama3") as caught:
        client.chat("llama3", QUESTION)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="one model"):
        list(client.pull("llama3", stream=True))


def test_a_stream_that_is_closed_gives_its_pages_back(
    client: ollama.Client, server: Server
) -> None:
    aborted = server.wait_until_idle()["num_aborted"]
    parts = client.generate(MODEL, "Tell me a very long story.", stream=True)
    next(iter(parts))
    parts.close()
    counters = server.wait_until_idle()
    assert counters["num_leased_pages"] == 0
    assert counters["num_aborted"] == aborted + 1
