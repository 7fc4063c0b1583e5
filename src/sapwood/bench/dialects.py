"""The wire formats a benchmark speaks: OpenAI completions and chat, and the native /generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from sapwood.base.registry import Registry
from sapwood.bench.http_stream import HttpError, error_text
from sapwood.bench.workloads.workload import BenchRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts that the server states; None where it states none."""

    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """The contents of one event of a stream.

    has_token  whether the event has new text or tokens, not only a role, a finish or a usage
    usage      the token counts so far, which replace earlier ones; None: the event has none
    finish     why the request ended; None: the event does not say
    """

    has_token: bool
    usage: Usage | None = None
    finish: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The settings that all requests of a run have in common.

    model        name to send; None: none
    ignore_eos   force the output length
    extra        further fields of the body
    """

    model: str | None
    temperature: float
    ignore_eos: bool
    extra: Mapping[str, Any]


class Dialect(Protocol):
    """Writes one request and reads its stream; one instance per request."""

    @property
    def path(self) -> str: ...

    @property
    def takes_token_ids(self) -> bool: ...

    def body(self, request: BenchRequest, asked: Asked) -> dict[str, Any]: ...

    def read(self, payload: bytes) -> StreamEvent:
        """Read one event; HttpError if it reports a failure or is not of this dialect."""
        ...


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _OpenAIUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _OpenAIChunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _OpenAIUsage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_OpenAIChunk).decode


def _openai_fields(request: BenchRequest, asked: Asked) -> dict[str, Any]:
    body: dict[str, Any] = {
        "max_tokens": request.num_output_tokens,
        "temperature": asked.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if asked.model is not None:
        body["model"] = asked.model
    if asked.ignore_eos:
        # vLLM, SGLang and sapwood know these two fields; OpenAI itself refuses them.
        body |= {"ignore_eos": True, "min_tokens": request.num_output_tokens}
    return body | dict(asked.extra)


def _read_chunk(payload: bytes) -> _OpenAIChunk:
    try:
        chunk = _decode_chunk(payload)
    except msgspec.MsgspecError as error:
        raise HttpError(f"an event is not of this dialect: {error}: {payload[:120]!r}") from error
    if chunk.error is not None:
        raise HttpError(f"the stream ended with an error: {error_text({'error': chunk.error})}")
    return chunk


def _openai_usage(usage: _OpenAIUsage | None) -> Usage | None:
    if usage is None:
        return None
    details = usage.prompt_tokens_details
    return Usage(
        num_prompt_tokens=usage.prompt_tokens,
        num_output_tokens=usage.completion_tokens,
        num_cached_tokens=None if details is None else details.cached_tokens,
    )


class Completions:
    path = "/v1/completions"
    takes_token_ids = True

    def body(self, request: BenchRequest, asked: Asked) -> dict[str, Any]:
        return {"prompt": request.prompt, **_openai_fields(request, asked)}

    def read(self, payload: bytes) -> StreamEvent:
        chunk = _read_chunk(payload)
        finish = next((c.finish_reason for c in chunk.choices if c.finish_reason), None)
        # A token whose text is held back (half of a character) comes as an event with empty text.
        has_token = any(choice.text or not choice.finish_reason for choice in chunk.choices)
        return StreamEvent(has_token=has_token, usage=_openai_usage(chunk.usage), finish=finish)


class Chat:
    path = "/v1/chat/completions"
    takes_token_ids = False

    def body(self, request: BenchRequest, asked: Asked) -> dict[str, Any]:
        messages = [{"role": "user", "content": request.prompt}]
        return {"messages": messages, **_openai_fields(request, asked)}

    def read(self, payload: bytes) -> StreamEvent:
        chunk = _read_chunk(payload)
        finish = next((c.finish_reason for c in chunk.choices if c.finish_reason), None)
        # The first event of a chat usually carries the role and no text: nothing was computed yet.
        has_token = any(
            delta.content or delta.reasoning_content or delta.tool_calls
            for delta in (choice.delta for choice in chunk.choices)
            if delta is not None
        )
        return StreamEvent(has_token=has_token, usage=_openai_usage(chunk.usage), finish=finish)


class _MetaInfo(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: Any = None


class _NativeChunk(msgspec.Struct):
    text: str | None = None
    output_ids: list[int] | None = None
    meta_info: _MetaInfo | None = None
    error: Any = None


_decode_native = msgspec.json.Decoder(_NativeChunk).decode


class Native:
    path = "/generate"
    takes_token_ids = True

    def __init__(self) -> None:
        self._num_output_tokens = 0

    def body(self, request: BenchRequest, asked: Asked) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "max_new_tokens": request.num_output_tokens,
            "temperature": asked.temperature,
        }
        if asked.ignore_eos:
            sampling |= {"ignore_eos": True, "min_new_tokens": request.num_output_tokens}
        field = "text" if isinstance(request.prompt, str) else "input_ids"
        body = {field: request.prompt, "sampling_params": sampling, "stream": True}
        return body | dict(asked.extra)

    def read(self, payload: bytes) -> StreamEvent:
        try:
            chunk = _decode_native(payload)
        except msgspec.MsgspecError as error:
            message = f"an event is not of this dialect: {error}: {payload[:120]!r}"
            raise HttpError(message) from error
        if chunk.error is not None:
            raise HttpError(f"the stream ended with an error: {error_text({'error': chunk.error})}")
        meta = chunk.meta_info or _MetaInfo()
        finish = _native_finish(meta.finish_reason)
        usage = Usage(
            num_prompt_tokens=meta.prompt_tokens,
            num_output_tokens=meta.completion_tokens,
            num_cached_tokens=meta.cached_tokens,
        )
        return StreamEvent(has_token=self._has_token(chunk, meta), usage=usage, finish=finish)

    def _has_token(self, chunk: _NativeChunk, meta: _MetaInfo) -> bool:
        # The text is cumulative: an event that only finishes repeats it, so the count decides.
        if meta.completion_tokens is None:
            return bool(chunk.text or chunk.output_ids)
        grown = meta.completion_tokens > self._num_output_tokens
        self._num_output_tokens = meta.completion_tokens
        return grown


def _native_finish(reason: Any) -> str | None:
    """The kind of a finish_reason, which is null, a word, or {"type": …, "message": …}."""
    if not isinstance(reason, dict):
        return None if reason is None else str(reason)
    kind = str(reason.get("type"))
    if kind in ("abort", "error"):
        raise HttpError(f"the request ended with {kind}: {reason.get('message') or 'no message'}")
    return kind


DIALECTS: Registry[Callable[[], Dialect]] = Registry(
    "API",
    {
        "completions": "sapwood.bench.dialects:Completions",
        "chat": "sapwood.bench.dialects:Chat",
        "native": "sapwood.bench.dialects:Native",
    },
    entry_point="sapwood.bench_dialects",
)
