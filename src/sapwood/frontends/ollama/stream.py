"""Answers of Ollama's dialect: JSON objects, one a line, the last with counts and durations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import orjson

from sapwood.base.errors import EngineUnavailable, SapwoodError
from sapwood.frontends.serving.chat import Turn
from sapwood.frontends.serving.encoded_lists import EncodedList
from sapwood.frontends.serving.generate import Choice, generate
from sapwood.frontends.serving.services import Services
from sapwood.frontends.serving.token_entries import token_entries
from sapwood.http.errors import ollama_body
from sapwood.http.sse import Framing
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.text.events import Answer as Whole
from sapwood.text.events import AnswerBuilder, Content, Event, Reasoning, ToolCall
from sapwood.text.generation import TextChunk, TextRequest
from sapwood.text.token_names import TokenNames

PartFields = Callable[[str, str, list[dict[str, Any]]], dict[str, Any]]
"""Makes an answer's fields for content, thinking and calls, which differ for chat and generate."""


def chat_fields(content: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def generate_fields(content: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"response": content} | ({"thinking": thinking} if thinking else {})


def line(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content) + b"\n"


def _failure(error: SapwoodError) -> bytes:
    return line(ollama_body(error))


NDJSON = "application/x-ndjson"
FRAMING = Framing(content_type=NDJSON.encode(), end=b"", failure=_failure)


def rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


class Answer:
    """Builds one answer while it is generated, with its counts and durations.

    model      the model's name as the client wrote it
    started_s  when the request arrived, on the services' clock
    """

    def __init__(
        self, services: Services, fields: PartFields, *, model: str, started_s: float
    ) -> None:
        self._clock = services.clock
        self._fields = fields
        self._model = model or services.model_name
        self._started_s = started_s
        self._first_s: float | None = None
        self._so_far = Choice()
        self._calls = AnswerBuilder()
        self._num_calls = 0

    def count(self, chunk: TextChunk) -> None:
        if self._first_s is None:
            self._first_s = self._clock.now_s()
        self._so_far.count(chunk)

    def part(
        self, new: Sequence[Event], logprobs: EncodedList | None = None
    ) -> dict[str, Any] | None:
        """The line for these events; None if there is nothing in them to send.

        logprobs  those of the tokens that the events came with
        """
        parts = AnswerBuilder()
        for event in new:
            # A call is sent whole, so its pieces are kept until it is complete.
            (parts if isinstance(event, Content | Reasoning) else self._calls).add(event)
        text, all_calls = parts.built(), self._calls.built().calls
        calls, self._num_calls = all_calls[self._num_calls :], len(all_calls)
        if not (text.content or text.reasoning or calls or logprobs is not None):
            return None
        shown = [_call(call) for call in calls]
        head = self._head(text.content, text.reasoning, shown) | {"done": False}
        return head if logprobs is None else head | {"logprobs": logprobs.json}

    def last(
        self, whole: Whole | None = None, logprobs: EncodedList | None = None
    ) -> dict[str, Any]:
        """The last line of the answer, after its last chunk was counted.

        whole     the whole answer, if it was not streamed
        logprobs  those of all its tokens, if they were asked for
        """
        so_far, finish = self._so_far, self._so_far.last.finish
        assert finish is not None
        assert self._first_s is not None
        now_s = self._clock.now_s()
        prompt_s = self._first_s - self._started_s - so_far.last.queue_time_s
        shown = whole or Whole()
        calls = [_call(call) for call in shown.calls]
        head = self._head(shown.content, shown.reasoning, calls)
        if logprobs is not None:
            head["logprobs"] = logprobs.json
        return head | {
            "done": True,
            "done_reason": finish.kind,
            "total_duration": nanoseconds(now_s - self._started_s),
            # The model was loaded before the server took requests.
            "load_duration": 0,
            "prompt_eval_count": so_far.last.num_prompt_tokens,
            "prompt_eval_duration": nanoseconds(prompt_s),
            "eval_count": so_far.last.num_output_tokens,
            "eval_duration": nanoseconds(now_s - self._first_s),
        }

    def loaded(self) -> dict[str, Any]:
        """The answer to a request without a prompt, by which clients load a model."""
        return self._head("", "", []) | {"done": True, "done_reason": "load"}

    def _head(self, content: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        created_at = rfc3339(datetime.now(UTC))
        head = {"model": self._model, "created_at": created_at}
        return head | self._fields(content, thinking, calls)


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": orjson.loads(call.arguments)}
    return {"id": call.call_id, "function": function}


def check_loaded(services: Services) -> None:
    reason = services.engine.unavailable_reason
    if reason is not None:
        raise EngineUnavailable(f"the engine does not serve: {reason}; try again later")


async def lines(
    services: Services, request: TextRequest, turn: Turn, answer: Answer
) -> AsyncGenerator[bytes, None]:
    sample = turn.sample()
    async with aclosing(generate(services, [request])) as chunks:
        async for _, chunk in chunks:
            answer.count(chunk)
            logprobs = None
            if chunk.logprobs is not None:
                logprobs = await _entries(services, request, chunk.token_ids, chunk.logprobs)
            part = answer.part(sample.add(chunk), logprobs)
            encoded = b"" if part is None else line(part)
            if chunk.finish is not None:
                encoded += line(answer.last())
            if encoded:
                yield encoded


async def whole(
    services: Services, request: TextRequest, turn: Turn, answer: Answer
) -> dict[str, Any]:
    sample = turn.sample()
    so_far = Choice()
    async with aclosing(generate(services, [request], keeps_logprobs=True)) as chunks:
        async for _, chunk in chunks:
            answer.count(chunk)
            so_far.add(chunk)
            sample.add(chunk)
    if request.options.logprobs is None:
        return answer.last(sample.answer)
    values = so_far.whole.logprobs or TokenLogprobs()
    return answer.last(
        sample.answer, await _entries(services, request, so_far.whole.token_ids, values)
    )


async def _entries(
    services: Services, request: TextRequest, token_ids: Sequence[int], values: TokenLogprobs
) -> EncodedList:
    assert request.options.logprobs is not None, "log probabilities were asked for"
    names = TokenNames(services.tokenizer.texts)
    return await token_entries(names, token_ids, values, request.options.logprobs.num_per_token)


def nanoseconds(duration_s: float) -> int:
    """At least 1, because clients divide counts by durations."""
    return max(1, round(duration_s * 1e9))
