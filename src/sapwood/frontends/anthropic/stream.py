"""Answers of Anthropic's dialect, whole and as named events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from sapwood.base.errors import SapwoodError
from sapwood.frontends.anthropic.errors import anthropic_statuses
from sapwood.frontends.serving.chat import Turn, TurnSample
from sapwood.frontends.serving.generate import Choice, generate
from sapwood.frontends.serving.services import Services
from sapwood.http.errors import anthropic_body
from sapwood.http.sse import EVENT_STREAM, Framing
from sapwood.schema.output import Finish
from sapwood.text.events import (
    Answer,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
)
from sapwood.text.generation import TextRequest


def _event(content: dict[str, Any]) -> bytes:
    """An event whose name is its content's type, as Anthropic's clients look for it."""
    name = str(content["type"]).encode()
    return b"event: " + name + b"\ndata: " + orjson.dumps(content) + b"\n\n"


def _failure(error: SapwoodError) -> bytes:
    return _event(anthropic_body(error))


FRAMING = Framing(content_type=EVENT_STREAM, end=b"", failure=_failure)
"""No [DONE]: the last event is message_stop, or error."""


def message(
    answer_id: str,
    model: str,
    so_far: Choice,
    content: list[dict[str, Any]],
    sample: TurnSample | None = None,
) -> dict[str, Any]:
    """A message of Anthropic's API.

    sample  the answer, if it is complete; None: the message that begins a stream
    """
    return {
        "id": answer_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        **stop_fields(so_far.last.finish if sample is not None else None, sample),
        "usage": usage(so_far),
    }


def blocks(answer: Answer) -> list[dict[str, Any]]:
    """The blocks of an answer: thinking, text and calls; an empty answer is an empty text."""
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append(_thinking_block(answer.reasoning))
    if answer.content or not (answer.calls or answer.reasoning):
        content.append({"type": "text", "text": answer.content})
    for call in answer.calls:
        block = {"type": "tool_use", "id": call.call_id, "name": call.name}
        content.append({**block, "input": orjson.loads(call.arguments)})
    return content


def stop_fields(finish: Finish | None, sample: TurnSample | None) -> dict[str, str | None]:
    """stop_reason and stop_sequence; both null while the answer goes on."""
    if finish is None:
        return {"stop_reason": None, "stop_sequence": None}
    if finish.kind == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if finish.kind == "abort":
        # Anthropic's word for an interrupted turn; a client may send it back to continue it.
        return {"stop_reason": "pause_turn", "stop_sequence": None}
    if sample is not None and sample.finish_reason(finish) == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(finish.matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.matched}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def usage(so_far: Choice) -> dict[str, int]:
    """The usage. Anthropic's input_tokens does not count the prompt tokens from the cache."""
    return {
        "input_tokens": so_far.last.num_prompt_tokens - so_far.last.num_cached_tokens,
        # Their count of tokens that are billed as written to the cache; here all are, for nothing.
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": so_far.last.num_cached_tokens,
        "output_tokens": so_far.last.num_output_tokens,
    }


async def encoded_events(
    services: Services, request: TextRequest, turn: Turn
) -> AsyncGenerator[bytes, None]:
    """All events of an answer; the first waits for a token, which brings the prompt's counts."""
    so_far = Choice()
    sample = turn.sample()
    content = _Blocks()
    begun = False
    with anthropic_statuses():
        async with aclosing(generate(services, [request])) as chunks:
            async for _, chunk in chunks:
                so_far.count(chunk)
                encoded = b"" if begun else _opening(services, request, so_far)
                begun = True
                encoded += b"".join(map(content.add, sample.add(chunk)))
                if chunk.finish is not None:
                    encoded += content.end() + _closing(so_far, sample)
                if encoded:
                    yield encoded


class _Blocks:
    """Turns an answer into the events of its blocks, of which there is at least one.

    A tool call is sent when it is complete, so that no client sees a call that fails.
    """

    def __init__(self) -> None:
        self._index = -1
        self._kind = ""
        self._call: CallStart | None = None
        self._arguments: list[str] = []

    def add(self, event: Event) -> bytes:
        match event:
            case Content(text):
                return self._text("text", {"type": "text", "text": ""}, "text_delta", text)
            case Reasoning(text):
                return self._text("thinking", _thinking_block(""), "thinking_delta", text)
            case CallStart():
                self._call, self._arguments = event, []
            case CallArguments(_, text):
                self._arguments.append(text)
            case CallEnd():
                return self._whole_call()
            case _:
                pass
        return b""

    def end(self) -> bytes:
        if self._index < 0:
            return self._start("text", {"type": "text", "text": ""}) + self._stop()
        return self._stop()

    def _text(self, kind: str, block: dict[str, Any], delta: str, text: str) -> bytes:
        encoded = b"" if self._kind == kind else self._stop() + self._start(kind, block)
        content = {"type": delta, kind: text}
        return encoded + self._delta(content)

    def _whole_call(self) -> bytes:
        assert self._call is not None
        name, call_id = self._call.name, self._call.call_id
        block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": "".join(self._arguments)}
        return self._stop() + self._start("tool_use", block) + self._delta(delta)

    def _start(self, kind: str, block: dict[str, Any]) -> bytes:
        self._kind = kind
        self._index += 1
        # Like Anthropic's own streams, ours have a ping after the beginning of the first block.
        ping = b"" if self._index else _event({"type": "ping"})
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return _event(start) + ping

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _stop(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return _event({"type": "content_block_stop", "index": self._index})


def _thinking_block(text: str) -> dict[str, Any]:
    """The signature is Anthropic's proof that it wrote the text; there is none here."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def _opening(services: Services, request: TextRequest, so_far: Choice) -> bytes:
    begun = message(request.request_id, services.model_name, so_far, content=[])
    return _event({"type": "message_start", "message": begun})


def _closing(so_far: Choice, sample: TurnSample) -> bytes:
    delta = stop_fields(so_far.last.finish, sample)
    return _event({"type": "message_delta", "delta": delta, "usage": usage(so_far)}) + _event(
        {"type": "message_stop"}
    )
