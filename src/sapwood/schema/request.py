"""What the API process asks of an engine: tagged msgspec structs, never pickle."""

from __future__ import annotations

import msgspec

from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.sampling import SamplingParams

FLOAT32_BYTES = 4
"""Of a number in a vector of `Generate.input_embeds`."""


class Embed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Wanted of a prompt once it is computed, instead of output tokens: its vector, or the numbers
    of a classification head, whichever the model has.

    num_first  tokens of the first text, where the prompt is a pair of texts that the model tells
               apart; None: one text
    """

    num_first: int | None = None


class TraceContext(msgspec.Struct, frozen=True):
    """Joins the engine's spans of a request to those of the API process.

    traceparent  W3C trace context of the span above; sent_ns: Unix time when the request was sent
    """

    traceparent: str
    sent_ns: int


class Generate(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """One request for one continuation.

    prompt_ids  at least one token id; zeros, as many as there are vectors, with input_embeds
    input_embeds  the vectors in the place of the embeddings of the prompt's tokens, if it came so:
                fp32, little endian, one piece per token
    extra_key   prefix pages are shared only among requests with the same key
    priority    larger is sooner, unless the server is told the opposite; None: its default
    routing_key  requests with the same key probably share prefixes; "": none
    logprobs    which log probabilities to tell; None: of no token
    embed       numbers are wanted and no tokens: sampling.max_new_tokens is 0, and the request ends
                with its prompt
    return_hidden_states  the hidden state of every token but the last output token is wanted
    trace       set if the request is traced
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    input_embeds: list[bytes] = []
    extra_key: str = ""
    priority: int | None = None
    routing_key: str = ""
    logprobs: LogprobOptions | None = None
    embed: Embed | None = None
    return_hidden_states: bool = False
    trace: TraceContext | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End that request now, in whatever state it is; an id that has ended is ignored."""

    request_id: str


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Forget every prefix that no request uses; answered by a `CacheFlushed` with the same id."""

    call_id: str


class GetStatus(msgspec.Struct, frozen=True, tag=True):
    """Answered by an `EngineStatus` with the same id."""

    call_id: str


class StartProfile(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Record what the engine does into files; answered by a `CallDone` with the same id.

    The fields are those of `observe.profiling.ProfileOrder`.
    """

    call_id: str
    folder: str
    name: str
    start_step: int | None = None
    num_steps: int | None = None
    activities: tuple[str, ...] = ()
    by_stage: bool = False
    with_stack: bool = False
    record_shapes: bool = False


class StopProfile(msgspec.Struct, frozen=True, tag=True):
    """End the profile and write its files; answered by a `CallDone` with the same id."""

    call_id: str


class FreezeGc(msgspec.Struct, frozen=True, tag=True):
    """Exempt all objects that exist now from garbage collection; answered by a `CallDone`."""

    call_id: str


class SlowDown(msgspec.Struct, frozen=True, tag=True):
    """Let the engine rest before each step from now on; answered by a `CallDone`.

    sleep_s  0: no longer
    """

    call_id: str
    sleep_s: float


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Refuse new requests, finish the open ones, then end the loop.

    timeout_s  what is still open after this long is aborted
    """

    timeout_s: float


EngineInput = (
    Generate
    | Abort
    | FlushCache
    | GetStatus
    | StartProfile
    | StopProfile
    | FreezeGc
    | SlowDown
    | Drain
)
