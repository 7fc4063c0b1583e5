"""Answers of Ollama's dialect: JSON objects, one a line, the last with counts and durations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import orjson

from sapwood.base.errors import EngineUnavailable, SapwoodError
from sapwood.frontends.common.errors import ollama_body
from sapwood.frontends.common.generate import Choice, generate
from sapwood.frontends.common.services import Services
from sapwood.frontends.common.sse import Framing
from sapwood.text.generation import TextChunk, TextRequest

TextFields = Callable[[str], dict[str, Any]]
"""How an answer holds a text: chat and generate differ in nothing else."""


def chat_fields(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def generate_fields(text: str) -> dict[str, Any]:
    return {"response": text}


def line(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content) + b"\n"


def _failure(error: SapwoodError) -> bytes:
    return line(ollama_body(error))


FRAMING = Framing(content_type=b"application/x-ndjson", end=b"", failure=_failure)


def rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


class Answer:
    """One answer as it comes: its counts, and when its parts were there.

    model      the model's name as the client wrote it
    started_s  when the request arrived, on the services' clock
    """

    def __init__(
        self, services: Services, fields: TextFields, *, model: str, started_s: float
    ) -> None:
        self._clock = services.clock
        self._fields = fields
        self._model = model or services.model_name
        self._started_s = started_s
        self._first_s: float | None = None
        self._so_far = Choice()

    def count(self, chunk: TextChunk) -> None:
        if self._first_s is None:
            self._first_s = self._clock.now_s()
        self._so_far.count(chunk)

    def part(self, text: str) -> dict[str, Any]:
        return self._head(text) | {"done": False}

    def last(self, text: str) -> dict[str, Any]:
        """The end of the answer, after its last chunk was counted."""
        so_far, finish = self._so_far, self._so_far.finish
        assert finish is not None
        assert self._first_s is not None
        now_s = self._clock.now_s()
        prompt_s = self._first_s - self._started_s - so_far.queue_time_s
        return self._head(text) | {
            "done": True,
            "done_reason": finish.kind,
            "total_duration": _ns(now_s - self._started_s),
            # The model was loaded before the server took requests.
            "load_duration": 0,
            "prompt_eval_count": so_far.num_prompt_tokens,
            "prompt_eval_duration": _ns(prompt_s),
            "eval_count": so_far.num_output_tokens,
            "eval_duration": _ns(now_s - self._first_s),
        }

    def loaded(self) -> dict[str, Any]:
        """The answer to a request without a prompt, by which clients load a model."""
        return self._head("") | {"done": True, "done_reason": "load"}

    def _head(self, text: str) -> dict[str, Any]:
        created_at = rfc3339(datetime.now(UTC))
        return {"model": self._model, "created_at": created_at} | self._fields(text)


def check_loaded(services: Services) -> None:
    reason = services.engine.unavailable_reason
    if reason is not None:
        raise EngineUnavailable(f"the engine does not serve: {reason}; try again later")


async def lines(
    services: Services, request: TextRequest, answer: Answer
) -> AsyncGenerator[bytes, None]:
    async with aclosing(generate(services, [request])) as chunks:
        async for _, chunk in chunks:
            answer.count(chunk)
            encoded = line(answer.part(chunk.text)) if chunk.text else b""
            if chunk.finish is not None:
                encoded += line(answer.last(""))
            if encoded:
                yield encoded


async def whole(services: Services, request: TextRequest, answer: Answer) -> dict[str, Any]:
    texts: list[str] = []
    async with aclosing(generate(services, [request])) as chunks:
        async for _, chunk in chunks:
            answer.count(chunk)
            texts.append(chunk.text)
    return answer.last("".join(texts))


def _ns(duration_s: float) -> int:
    """At least 1: clients divide counts by durations."""
    return max(1, round(duration_s * 1e9))
