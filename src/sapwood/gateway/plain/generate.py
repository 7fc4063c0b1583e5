"""A request for tokens as the body of /generate, and its events as outputs.

Source: parity with SGLang's native API, which sapwood's own engines have as well.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from sapwood.base.errors import UnsupportedFeature
from sapwood.schema.grammar import Grammar
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.output import Finish, RequestOutput
from sapwood.schema.request import Generate
from sapwood.schema.sampling import SamplingParams

MAX_EVENT_BYTES = 32 << 20
"""An event holds the whole answer so far."""
MAX_ID = 2**31 - 1
_NATIVE = {
    "min_new_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "seed": "sampling_seed",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
}
"""Sampling parameters that mean the same there -> their names. Stop strings and all that concerns
the text are not among them: the gateway makes the text."""


class MalformedAnswer(ValueError):
    """A worker's answer is no answer of /generate."""


def generate_body(request: Generate, *, model: str, max_new_tokens: int | None) -> bytes:
    """The body of the request for /generate, with its events as a stream.

    model           what workers serve
    max_new_tokens  output tokens at most; None: as the engine likes
    Raises          UnsupportedFeature for what such a request cannot ask for
    """
    options = request.options
    check_request(request)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    defaults = SamplingParams()
    for name, native in _NATIVE.items():
        value = getattr(options.sampling, name)
        if value != getattr(defaults, name):
            sampling[native] = value
    if options.sampling.logit_bias:
        sampling["logit_bias"] = {str(k): v for k, v in options.sampling.logit_bias.items()}
    if options.sampling.grammar is not None:
        sampling |= grammar_fields(options.sampling.grammar)
    body: dict[str, Any] = {
        "rid": request.request_id,
        "input_ids": request.prompt_ids,
        "sampling_params": sampling,
        "stream": True,
    }
    if model:
        body["model"] = model
    if options.namespace:
        body["extra_key"] = options.namespace
    for name in ("priority", "routing_key", "data_parallel_rank"):
        value = getattr(options, name)
        if value not in (None, ""):
            body[name] = value
    if options.logprobs is not None:
        body["return_logprob"] = True
        body["logprob_start_len"] = -1
        if options.logprobs.num_top:
            body["top_logprobs_num"] = options.logprobs.num_top
    return msgspec.json.encode(body)


def check_request(request: Generate) -> None:
    """UnsupportedFeature for what no engine can be asked for where the gateway makes the text."""
    options = request.options
    sampling = options.sampling
    refused = {
        "repeat_last_n": sampling.penalty_window != -1,
        "allowed_token_ids": bool(sampling.allowed_token_ids),
        "thinking_budget": sampling.thinking_budget is not None,
        "return_hidden_states": options.return_hidden_states,
        "return_routed_experts": options.return_routed_experts,
        "token_ids_logprob": options.logprobs is not None and bool(options.logprobs.token_ids),
        "logprob_start_len": options.prompt_scores_start is not None,
        "custom_logit_processor": sampling.custom_logit_processor is not None,
    }
    for name, is_asked in refused.items():
        if is_asked:
            raise UnsupportedFeature(
                f"{name} is not possible where the gateway makes the chats; leave it out, or ask "
                "an engine itself",
                param=name,
            )


def grammar_fields(grammar: Grammar) -> dict[str, Any]:
    """{field of SGLang's sampling parameters: its text}"""
    if grammar.thinking is not None:
        raise UnsupportedFeature(
            "a grammar for the answer of a model that thinks is not possible where the gateway "
            "makes the chats: the engine would hold the thinking to it; turn the thinking off in "
            "chat_template_kwargs, or leave the grammar out",
            param="response_format",
        )
    if grammar.kind == "choice":
        options = (json.dumps(one, ensure_ascii=False) for one in json.loads(grammar.text))
        return {"ebnf": f"root ::= {' | '.join(options)}"}
    return {grammar.kind: grammar.text}


class _ByTier(msgspec.Struct):
    host: int = 0
    storage: int = 0


class _Meta(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    cached_tokens: int = 0
    cached_tokens_details: _ByTier | None = None
    finish_reason: dict[str, Any] | str | None = None
    output_token_logprobs: list[Any] = []
    output_top_logprobs: list[Any] = []


class _Event(msgspec.Struct):
    output_ids: list[int] = []
    meta_info: _Meta = msgspec.field(default_factory=_Meta)
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Event).decode


class GenerateEvents:
    """Reads the events of one /generate as they come, in pieces that may end anywhere.

    An engine tells all output tokens so far in each event, or only the new ones; the count beside
    them says which.
    """

    def __init__(self, request: Generate) -> None:
        self._request = request
        self._rest = b""
        self._num_ids = 0
        self._num_logprobs = 0
        self.is_done = False

    def feed(self, piece: bytes) -> list[RequestOutput]:
        """The outputs of the events that are whole now. MalformedAnswer if they are none."""
        *whole, rest = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise MalformedAnswer(f"an event has more than {MAX_EVENT_BYTES} bytes")
        self._rest = rest
        # Where events tell everything so far, those that came together are in the last of them.
        # Each is read all the same, since they may tell only what is new.
        return [output for text in whole if (output := self._output(text)) is not None]

    def _output(self, text: bytes) -> RequestOutput | None:
        data = b"".join(line[5:].strip() for line in text.split(b"\n") if line.startswith(b"data:"))
        if not data or data == b"[DONE]" or self.is_done:
            return None
        try:
            event = _decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise MalformedAnswer(f"an event is none of /generate: {error}") from None
        if event.error is not None:
            raise MalformedAnswer(f"the engine failed: {bytes(event.error)[:500]!r}")
        meta = event.meta_info
        new = self._new_ids(event)
        tiers = meta.cached_tokens_details or _ByTier()
        finish = _finish(meta.finish_reason)
        self.is_done = finish is not None
        return RequestOutput(
            request_id=self._request.request_id,
            token_ids=new,
            num_prompt_tokens=len(self._request.prompt_ids),
            num_cached_tokens=meta.cached_tokens,
            tier_tokens=(tiers.host, tiers.storage),
            logprobs=self._logprobs(meta, len(new)),
            finish=finish,
        )

    def _new_ids(self, event: _Event) -> list[int]:
        ids, count = event.output_ids, event.meta_info.completion_tokens
        if count is None or len(ids) == count:
            new = ids[self._num_ids :]
        elif self._num_ids + len(ids) == count:
            new = ids
        else:
            raise MalformedAnswer(
                f"an event has {len(ids)} output_ids after {self._num_ids} earlier ones, but says "
                f"that there are {count}"
            )
        self._num_ids += len(new)
        if new and not (min(new) >= 0 and max(new) <= MAX_ID):
            raise MalformedAnswer(f"an event has token ids from {min(new)} to {max(new)}")
        return new

    def _logprobs(self, meta: _Meta, num_new: int) -> TokenLogprobs | None:
        """Those of the new tokens; the lists hold those of all tokens, or of the new ones."""
        asked = self._request.options.logprobs
        if asked is None or not num_new:
            return None
        told = meta.output_token_logprobs[-num_new:]
        top = meta.output_top_logprobs[-num_new:] if asked.num_top else []
        try:
            tops = [list(row or [])[: asked.num_top] for row in top]
            if len(told) != num_new or (
                asked.num_top and any(len(r) < asked.num_top for r in tops)
            ):
                raise MalformedAnswer("an event lacks log probabilities that were asked for")
            return packed_logprobs(
                [float(row[0]) for row in told],
                [[(float(one[0]), int(one[1])) for one in row] for row in tops],
            )
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise MalformedAnswer(f"log probabilities cannot be read: {error}") from None


def packed_logprobs(
    tokens: Sequence[float], top: Sequence[Sequence[tuple[float, int]]]
) -> TokenLogprobs:
    flat = [pair for row in top for pair in row]
    return TokenLogprobs(
        tokens=struct.pack(f"<{len(tokens)}f", *tokens),
        top_ids=struct.pack(f"<{len(flat)}i", *(id_ for _, id_ in flat)),
        top=struct.pack(f"<{len(flat)}f", *(value for value, _ in flat)),
    )


def _finish(told: dict[str, Any] | str | None) -> Finish | None:
    if told is None:
        return None
    reason = {"type": told} if isinstance(told, str) else told
    kind, matched = reason.get("type"), reason.get("matched")
    if kind == "length":
        return Finish(kind="length")
    if kind == "stop":
        is_known = isinstance(matched, int | str) and not isinstance(matched, bool)
        return Finish(kind="stop", matched=matched if is_known else None)
    message = str(reason.get("message") or "the engine has ended the request")[:1000]
    status = reason.get("status_code")
    if isinstance(status, int) and 400 <= status < 600:
        kind_of_error = "BadRequestError" if status < 500 else "InternalServerError"
        return Finish(kind="error", message=message, status=status, error_type=kind_of_error)
    return Finish(kind="abort", message=message)
