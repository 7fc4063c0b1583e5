"""Answers of Anthropic's dialect, whole and as named events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from sapwood.base.errors import SapwoodError
from sapwood.frontends.anthropic.errors import anthropic_statuses
from sapwood.frontends.common.errors import anthropic_body
from sapwood.frontends.common.generate import Choice, generate
from sapwood.frontends.common.services import Services
from sapwood.frontends.common.sse import EVENT_STREAM, Framing
from sapwood.schema.output import Finish
from sapwood.text.generation import TextRequest

_DELTA_HEAD = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":'
)
_DELTA_TAIL = b"}}\n\n"


def _event(content: dict[str, Any]) -> bytes:
    """An event whose name is its content's type, as Anthropic's clients look for it."""
    name = str(content["type"]).encode()
    return b"event: " + name + b"\ndata: " + orjson.dumps(content) + b"\n\n"


def _failure(error: SapwoodError) -> bytes:
    return _event(anthropic_body(error))


FRAMING = Framing(content_type=EVENT_STREAM, end=b"", failure=_failure)
"""No [DONE]: the last event is message_stop, or error."""


def message(answer_id: str, model: str, so_far: Choice, content: list[Any]) -> dict[str, Any]:
    return {
        "id": answer_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        **stop_fields(so_far.finish),
        "usage": usage(so_far),
    }


def stop_fields(finish: Finish | None) -> dict[str, str | None]:
    """stop_reason and stop_sequence; both null while the answer goes on."""
    if finish is None:
        return {"stop_reason": None, "stop_sequence": None}
    if finish.kind == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if finish.kind == "abort":
        # Anthropic's word for a turn that was broken off and can be sent back to be gone on with.
        return {"stop_reason": "pause_turn", "stop_sequence": None}
    if isinstance(finish.matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.matched}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def usage(so_far: Choice) -> dict[str, int]:
    """Anthropic's input_tokens leaves out what came from the cache; the prompt has both."""
    return {
        "input_tokens": so_far.num_prompt_tokens - so_far.num_cached_tokens,
        # Their count of tokens that are billed as written to the cache; here all are, for nothing.
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": so_far.num_cached_tokens,
        "output_tokens": so_far.num_output_tokens,
    }


async def encoded_events(services: Services, request: TextRequest) -> AsyncGenerator[bytes, None]:
    """All events of an answer, from its first token on: that brings the prompt's counts."""
    so_far = Choice()
    encoded: bytes | None = None
    with anthropic_statuses():
        async with aclosing(generate(services, [request])) as chunks:
            async for _, chunk in chunks:
                so_far.count(chunk)
                encoded = _opening(services, request, so_far) if encoded is None else b""
                if chunk.text:
                    encoded += _DELTA_HEAD + orjson.dumps(chunk.text) + _DELTA_TAIL
                if chunk.finish is not None:
                    encoded += _closing(so_far)
                if encoded:
                    yield encoded


def _opening(services: Services, request: TextRequest, so_far: Choice) -> bytes:
    begun = message(request.request_id, services.model_name, so_far, content=[])
    begun |= stop_fields(None)
    block = {"type": "text", "text": ""}
    return (
        _event({"type": "message_start", "message": begun})
        + _event({"type": "content_block_start", "index": 0, "content_block": block})
        + _event({"type": "ping"})
    )


def _closing(so_far: Choice) -> bytes:
    delta = stop_fields(so_far.finish)
    return (
        _event({"type": "content_block_stop", "index": 0})
        + _event({"type": "message_delta", "delta": delta, "usage": usage(so_far)})
        + _event({"type": "message_stop"})
    )
