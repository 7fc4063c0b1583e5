"""What the API process asks of an engine: tagged msgspec structs, never pickle."""

from __future__ import annotations

from typing import Literal

import msgspec

from sapwood.schema.handover import Handover
from sapwood.schema.limits import ROUTING_KEY
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.media import Medium
from sapwood.schema.namespace import DIGEST_CHARACTERS
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.weights import WeightOrder

FLOAT32_BYTES = 4
"""Bytes of each number in the vectors of `Generate.input_embeds`."""


class Embed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for the prompt's embedding, or for the scores of a classification head.

    Such a request ends with its prompt: it has no output tokens. Which of the two it gets depends
    on the model.

    num_first  tokens of the first text, if the prompt is a pair of texts that the model tells
               apart; None: the prompt is one text
    """

    num_first: int | None = None


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a request asks for besides its prompt. It is carried whole, from the dialect that
    reads the request to the rank's row: nothing in between lists its fields.

    sampling      how tokens are chosen, and when the output ends
    logprobs      the log probabilities that the request wants; None: none
    embed         set if the request wants an embedding or scores; then it has no output tokens
    return_hidden_states  whether the request wants the hidden state of every token, except that of
                  its last output token
    return_routed_experts  the same for the experts that compute a token
    namespace     prefix pages are shared only among requests with the same one: a digest
                  (`schema.namespace.cache_namespace`); "": that of requests that name none
    priority      larger is sooner, unless the server is told the opposite; None: its default
    routing_key   requests with the same key probably share prefixes; "": none
    adapter       id of the LoRA adapter (`LoadAdapter`); "": the base model
    data_parallel_rank  the replica that is to answer; None: any
    handover      where the prompt's pages go from the engine that reads it to the one that
                  answers; None: one engine does both
    """

    sampling: SamplingParams = SamplingParams()
    logprobs: LogprobOptions | None = None
    embed: Embed | None = None
    return_hidden_states: bool = False
    return_routed_experts: bool = False
    namespace: str = ""
    priority: int | None = None
    routing_key: str = ""
    adapter: str = ""
    data_parallel_rank: int | None = None
    handover: Handover | None = None

    def __post_init__(self) -> None:
        ROUTING_KEY.check(len(self.routing_key), "routing_key")
        if len(self.namespace) > DIGEST_CHARACTERS:
            raise ValueError("a request's namespace must be a digest")

    @property
    def tells_of_tokens(self) -> bool:
        """Whether the answer has something of every token that is computed."""
        return self.return_hidden_states or self.return_routed_experts

    @property
    def prompt_scores_start(self) -> int | None:
        """The prompt token after which log probabilities are wanted; None: of no prompt token."""
        return None if self.logprobs is None else self.logprobs.prompt_start


class TraceContext(msgspec.Struct, frozen=True):
    """Joins the engine's spans of a request to those of the API process.

    traceparent  W3C trace context of the span above
    sent_ns      Unix time at which the request was sent
    """

    traceparent: str
    sent_ns: int


class Generate(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """One request for one continuation.

    prompt_ids  at least one token id; with input_embeds, a zero for each vector
    input_embeds  vectors that take the place of the token embeddings: fp32, little endian, one
                piece per token; empty: the prompt consists of token ids
    media       the pictures and videos that stand in the prompt, in its order
    options     what the request asks for; with `embed`, sampling.max_new_tokens is 0
    trace       set if the request is traced
    """

    request_id: str
    prompt_ids: list[int]
    options: RequestOptions
    input_embeds: list[bytes] = []
    media: list[Medium] = []
    trace: TraceContext | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End the request with that id now, in whatever state it is; an unknown id is ignored."""

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


class RecordExperts(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Start, stop or write the record of which experts are chosen; answered by a `CallDone`.

    suffix  of the file's name
    """

    call_id: str
    action: Literal["start", "stop", "dump"]
    suffix: str = ""


class FreezeGc(msgspec.Struct, frozen=True, tag=True):
    """Exempt all objects that exist now from garbage collection; answered by a `CallDone`."""

    call_id: str


class SlowDown(msgspec.Struct, frozen=True, tag=True):
    """Let the engine rest before each step from now on; answered by a `CallDone`.

    sleep_s  0: no longer
    """

    call_id: str
    sleep_s: float


class SentAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter that comes as bytes instead of lying in a folder.

    config      adapter_config.json
    tensors     in the safetensors format, or a pickle of a dict of tensors
    is_pickled  which of them
    """

    config: bytes
    tensors: bytes
    is_pickled: bool = False


class LoadAdapter(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Load a LoRA adapter; answered by a `CallDone` with the same id.

    adapter_id  new for each load, so that nothing that was computed with an older adapter of the
                same name is taken for this one's
    path        the folder that PEFT's save_pretrained wrote, a catalogue name, or a hub repository
    sent        the adapter itself; it is in no folder then
    """

    call_id: str
    adapter_id: str
    path: str
    sent: SentAdapter | None = None


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget an adapter that no open request has; answered by a `CallDone` with the same id."""

    call_id: str
    adapter_id: str


class OrderWeights(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """An order about weights, memory or limits; answered by a `CallDone` with the same id.

    Updates are prepared beside the steps. Then they wait until no request runs, or are carried out
    at once while the engine is paused.

    abort_all    whether to end all open requests first
    flush_cache  whether to forget the prefixes that were computed with the old weights
    between_steps  whether an update comes between two steps of the requests that run, which keep
                   their KV; needs flush_cache false
    """

    call_id: str
    order: WeightOrder
    abort_all: bool = False
    flush_cache: bool = True
    between_steps: bool = False


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Compute no more steps until `Continue`; answered by a `CallDone` with the same id.

    mode  abort: open requests end; retract: running requests wait again, without their KV;
          in_place: they keep it
    """

    call_id: str
    mode: str


class Continue(msgspec.Struct, frozen=True, tag=True):
    """Go on after a `Pause`; answered by a `CallDone` with the same id."""

    call_id: str


class SteerTiers(msgspec.Struct, frozen=True, tag=True):
    """Attach a storage to the tiers of the cache, detach or clear it, or tell what is attached;
    answered by a `CallDone` with the same id.

    action           attach, detach, clear or status
    backend          the storage to attach
    extra            its settings, as JSON; None: there are none
    prefetch_policy  None: as it is
    write_policy     None: as it is
    """

    call_id: str
    action: str
    backend: str | None = None
    extra: str | None = None
    prefetch_policy: str | None = None
    write_policy: str | None = None


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Refuse new requests, finish the open ones, then end the loop.

    timeout_s  requests that are still open after this long are aborted
    """

    timeout_s: float


class StepBegun(msgspec.Struct, frozen=True, tag=True):
    """Another engine, which shares feed-forwards with this one, has begun its step of this number,
    counted from 1 like those of this engine; every engine takes part in every step."""

    number: int


class EngineEnds(msgspec.Struct, frozen=True, tag=True):
    """Another such engine will begin no more steps."""


EngineInput = (
    Generate
    | Abort
    | FlushCache
    | GetStatus
    | StartProfile
    | StopProfile
    | RecordExperts
    | FreezeGc
    | SlowDown
    | LoadAdapter
    | UnloadAdapter
    | OrderWeights
    | Pause
    | Continue
    | SteerTiers
    | Drain
    | StepBegun
    | EngineEnds
)
