"""Responses, files and batches by the official client against a real server."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.server import Server, serving
from tests.tiny import write_llama

MODEL = "smollm2-135m"
QUESTION = "What is the capital of Japan?"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_a_conversation_that_the_server_keeps(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model=MODEL, input=QUESTION, temperature=0, max_output_tokens=30
    )
    assert "Tokyo" in first.output_text
    assert first.status == "completed"
    second = client.responses.create(
        model=MODEL,
        input="And of Italy?",
        previous_response_id=first.id,
        temperature=0,
        max_output_tokens=30,
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    # Whole pages are shared.
    cached = second.usage.input_tokens_details.cached_tokens
    assert cached > first.usage.input_tokens - 16
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_streamed_it_is_the_same_text_and_what_a_chat_says(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0}
    whole = client.responses.create(**options, input=QUESTION, max_output_tokens=30)
    with client.responses.stream(**options, input=QUESTION, max_output_tokens=30) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    chat = client.chat.completions.create(
        **options, messages=[{"role": "user", "content": QUESTION}], max_tokens=30
    )
    assert text == whole.output_text == final.output_text == chat.choices[0].message.content
    assert final.status == whole.status


def test_in_the_background(client: openai.OpenAI, server: Server) -> None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "background": True}
    job = client.responses.create(**options, input=QUESTION, max_output_tokens=30)
    long = client.responses.create(
        **options, input="Tell me a very long story.", extra_body={"ignore_eos": True}
    )
    assert client.responses.cancel(long.id).status == "cancelled"
    end = time.monotonic() + 30
    while (now := client.responses.retrieve(job.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "Tokyo" in now.output_text
    assert server.wait_until_idle()["num_leased_pages"] == 0


def test_a_batch(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", lines(6, max_tokens=8)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    done = finished(client, batch.id)
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.total) == (6, 6)
    assert done.usage is not None
    assert 0 < done.usage.output_tokens <= 48
    assert len(answers(client, done)) == 6
    for one in (file.id, done.output_file_id):
        client.files.delete(one or "")


def lines(number: int, **body: Any) -> bytes:
    made = [
        {
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": f"Count to {i}."}], **body},
        }
        for i in range(number)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def finished(client: openai.OpenAI, batch_id: str, limit_s: float = 60.0) -> openai.types.Batch:
    end = time.monotonic() + limit_s
    while (now := client.batches.retrieve(batch_id)).status != "completed":
        assert now.status in ("validating", "in_progress", "finalizing"), now
        assert time.monotonic() < end, now
        time.sleep(0.05)
    return now


def answers(client: openai.OpenAI, batch: openai.types.Batch) -> dict[str, Any]:
    text = client.files.content(batch.output_file_id or "").text
    return {one["custom_id"]: one for one in map(json.loads, text.splitlines())}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_batch_and_a_conversation_survive_the_server(tmp_path: Path, end: int) -> None:
    """Ended in the middle, gently or not; live traffic comes first while the batch runs."""
    model = write_llama(tmp_path / "tiny")
    flags = ["--model", str(model), "--load-format", "dummy", "--dtype", "float32"]
    flags += ["--state-dir", str(tmp_path / "state"), "--batch-concurrency", "2"]
    body = {"max_tokens": 40, "min_tokens": 40, "temperature": 0}
    number = 60
    with serving(*flags) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        file = client.files.create(file=("in.jsonl", lines(number, **body)), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        said = client.responses.create(input="Hi", max_output_tokens=4)
        while not (progress := client.batches.retrieve(batch.id).request_counts):
            time.sleep(0.01)
        while progress.completed < 5:
            time.sleep(0.01)
            progress = client.batches.retrieve(batch.id).request_counts or progress
        client.close()
        engine = server.engine_pid()
        server.process.send_signal(end)
        server.process.wait(30)
        if end == signal.SIGKILL:
            os.kill(engine, signal.SIGKILL)
    with serving(*flags) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            done = finished(client, batch.id)
            told = answers(client, done)
            assert set(told) == {f"line-{i}" for i in range(number)}
            reasons = {
                one["response"]["body"]["choices"][0]["finish_reason"] for one in told.values()
            }
            assert reasons == {"length"}
            assert done.usage is not None
            assert done.usage.output_tokens == 40 * number
            again = client.responses.create(
                input="More", previous_response_id=said.id, max_output_tokens=4
            )
            assert again.status == "incomplete"
        # Less was computed than the whole batch takes.
        assert server.wait_until_idle()["num_output_tokens"] < 40 * number
