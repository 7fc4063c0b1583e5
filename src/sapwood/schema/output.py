"""What an engine answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from sapwood.schema.logprobs import TokenLogprobs


class Finish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request ended.

    kind     stop: end of sequence, stop token or stop string; length: a token limit;
             abort: by the client or by a drain; error: `message` and the HTTP `status` say which
    matched  the stop token id or stop string, for kind "stop"
    """

    kind: Literal["stop", "length", "abort", "error"]
    matched: int | str | None = None
    message: str | None = None
    status: int = 500
    error_type: str = "InternalServerError"


class Speculated(msgspec.Struct, frozen=True, kw_only=True):
    """How guesses have fared: those for one request, or for all.

    num_steps     steps that brought output tokens, with guesses or without; added up over requests
    num_drafted   tokens that were guessed
    num_accepted  those of them that were right
    """

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def after(self, num_drafted: int, num_accepted: int) -> Speculated:
        """The same after one step more."""
        return Speculated(
            num_steps=self.num_steps + 1,
            num_drafted=self.num_drafted + num_drafted,
            num_accepted=self.num_accepted + num_accepted,
        )

    @property
    def accept_length(self) -> float:
        """Output tokens per step."""
        return 1.0 + self.num_accepted / self.num_steps if self.num_steps else 1.0

    @property
    def draft_length(self) -> float:
        """Guesses per step."""
        return self.num_drafted / self.num_steps if self.num_steps else 0.0

    @property
    def accept_rate(self) -> float:
        """The share of right guesses."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0


class OutputDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step or several added to the output of one request, and the counts so far.

    token_ids          new output tokens, including a matched stop token
    num_prompt_tokens  prompt length in tokens
    num_cached_tokens  prompt tokens that came from the prefix cache
    tier_tokens        of these, those that came from the host and from the storage
    queue_time_s       seconds between arrival and the first step that computed something
    logprobs           log probabilities of `token_ids`, if the request wants them
    hidden_states      outputs of the last norm (fp32, little endian, one piece per token) for the
                       tokens that no earlier delta had, beginning with the prompt's
    routed_experts     the same for the experts that computed a token: int32 [layers, experts of a
                       token], little endian
    speculated         how guesses have fared so far; None: the engine guesses nothing
    finish             set in the last delta, and only there
    """

    ADDED: ClassVar[tuple[str, ...]] = ("token_ids", "logprobs", "hidden_states", "routed_experts")
    """The fields that add up; of all others the latest delta's value holds."""

    token_ids: Sequence[int]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    tier_tokens: tuple[int, int] = (0, 0)
    queue_time_s: float = 0.0
    logprobs: TokenLogprobs | None = None
    hidden_states: Sequence[bytes] = ()
    routed_experts: Sequence[bytes] = ()
    speculated: Speculated | None = None
    finish: Finish | None = None


class RequestOutput(OutputDelta, frozen=True, kw_only=True, omit_defaults=True):
    """An engine's delta of one request. Exactly one output of a request has a `finish`.

    prompt_logprobs    log probabilities of all prompt tokens after `prompt_start`, in the first
                       output after they were computed
    values             the embedding or scores that `RequestOptions.embed` asks for: fp32, little
                       endian
    """

    ADDED = (*OutputDelta.ADDED, "prompt_logprobs")

    request_id: str
    token_ids: list[int]
    prompt_logprobs: TokenLogprobs | None = None
    hidden_states: list[bytes] = []
    routed_experts: list[bytes] = []
    values: bytes = b""


D = TypeVar("D", bound=OutputDelta)


def summed(deltas: Sequence[D]) -> D:
    """One delta in the place of consecutive ones of the same request or sample; at least one."""
    latest = deltas[-1]
    if len(deltas) == 1:
        return latest
    sums = {name: _sum([getattr(delta, name) for delta in deltas]) for name in latest.ADDED}
    return msgspec.structs.replace(latest, **sums)


def _sum(values: Sequence[Any]) -> Any:
    """The values of one field one after the other: texts, sequences, or log probabilities."""
    some = [value for value in values if value]
    if len(some) <= 1:
        return some[0] if some else values[-1]
    if isinstance(some[0], TokenLogprobs):
        return TokenLogprobs.joined(some)
    if isinstance(some[0], str):
        return "".join(some)
    return type(some[0])(chain.from_iterable(some))


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """The outputs of one step, of several requests."""

    outputs: list[RequestOutput]


class PoolFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A pool of the cache (schema/cache.py).

    name        "full", "state", or "window_4096"
    size        pages, or slots of states
    unit_bytes  bytes of a page, or of a slot, in all of the pool's layers
    """

    name: str
    size: int
    unit_bytes: int


class PoolUse(msgspec.Struct, frozen=True, kw_only=True):
    """How many pages, or slots, of a pool are free, and how many running requests hold; the others
    are in the prefix cache alone."""

    num_free: int
    num_leased: int


class RankFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of an engine (see schema/config/parallel.py).

    stage         which share of the layers the rank has, of --pp-size
    weight_bytes  memory that loading the weights took; 0: unknown
    read_bytes    bytes of the checkpoint that the rank read; 0: none, or unknown
    load_s        seconds that went into loading the weights
    """

    rank: int
    stage: int
    host: str
    pid: int
    device: str
    num_threads: int
    weight_bytes: int = 0
    read_bytes: int = 0
    load_s: float = 0.0


class EngineReady(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message of an engine.

    context_length    prompt and output tokens of one request at most
    max_total_tokens  tokens that the KV pool holds
    startup_s         seconds from the process's start to this message
    load_s            seconds of these that went into loading the weights
    weight_bytes      memory that loading the weights took; 0: unknown
    routed_bytes      bytes of a token's routed experts, as int32; 0: they are not told
    pools             all pools of the cache, the one that keeps every token first, if there is one
    notes             one line for each choice that was resolved, with its reason
    options           the resolved configuration, option name -> value
    ranks             the ranks that compute the model, if they are several
    """

    context_length: int
    max_total_tokens: int
    page_size: int
    notes: list[str]
    options: dict[str, str | int | float | bool | None] = {}
    max_running_requests: int = 0
    startup_s: float = 0.0
    load_s: float = 0.0
    weight_bytes: int = 0
    routed_bytes: int = 0
    pools: tuple[PoolFacts, ...] = ()
    ranks: tuple[RankFacts, ...] = ()


class EngineFatal(msgspec.Struct, frozen=True, tag=True):
    """The last message of an engine that cannot go on."""

    reason: str


class CacheFlushed(msgspec.Struct, frozen=True, tag=True):
    call_id: str
    done: bool
    message: str


class CallDone(msgspec.Struct, frozen=True, tag=True):
    """The answer to a call that asks the engine to do something.

    done     whether the engine did so
    message  what the engine did, or why not
    """

    call_id: str
    done: bool
    message: str


class MediaUse(msgspec.Struct, frozen=True, kw_only=True):
    """Pictures and videos, and their vectors.

    num_encoded  media that were encoded
    num_shared   times that a request found the vectors of a medium that it shows
    num_bytes    of the vectors that are kept
    max_bytes    that they may take
    encoding_s   seconds that encoding took
    """

    num_encoded: int
    num_shared: int
    num_bytes: int
    max_bytes: int
    encoding_s: float


class HandoverCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts that one engine reads and another one answers.

    part           this engine's: prefill or decode
    num_done       whose pages have come to the other engine, or from it
    num_failed     whose pages have not
    num_under_way  that wait for the other engine, or for their pages
    """

    part: str
    num_done: int
    num_failed: int
    num_under_way: int


class TierUse(msgspec.Struct, frozen=True, kw_only=True):
    """The tiers of the cache behind the pools in which steps compute.

    num_host_tokens      prompt tokens that came back from the host
    num_stored_tokens    those that came from the storage
    num_host_pages       pages and states that the host has
    num_host_slots       for which it has room
    num_saved            pages and states that were copied to the host
    num_restored         that came back
    num_written          that the storage was given
    num_read             that were read from there
    num_missed           that were not there, or not whole, when they were read
    num_unwritten        that were not written: for want of time, or after a failure
    num_failures         failures of the storage
    bytes_written, bytes_read
    write_s, read_s      seconds that this took
    storage              its name; "": none is attached
    """

    num_host_tokens: int
    num_stored_tokens: int
    num_host_pages: int
    num_host_slots: int
    num_saved: int
    num_restored: int
    num_written: int = 0
    num_read: int = 0
    num_missed: int = 0
    num_unwritten: int = 0
    num_failures: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    write_s: float = 0.0
    read_s: float = 0.0
    storage: str = ""


class AdapterUse(msgspec.Struct, frozen=True, kw_only=True):
    """LoRA adapters in the memory that steps read.

    num_used       adapters that are there, whether or not a request has them
    num_slots      different adapters that may run at once
    bytes_used     of max_bytes
    num_loaded     adapters that the engine has, there or on the host
    num_evictions  adapters that made room for others
    """

    num_used: int
    num_slots: int
    bytes_used: int
    max_bytes: int
    num_loaded: int
    num_evictions: int

    @property
    def utilization(self) -> float:
        """Share of the memory that is in use."""
        return self.bytes_used / self.max_bytes if self.max_bytes else 0.0


class KVEventCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Events of the prefix cache: those that were published, and those for which there was no
    room."""

    num_published: int
    num_dropped: int


class EngineStatus(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Counters and gauges; counters grow from the engine's start.

    num_pages            of the first pool, as the three after it; num_cached_pages are in the
                         prefix cache, whether or not a running request holds them
    pools                of all pools, in the order of `EngineReady.pools`
    num_computed_tokens  tokens that went through the model
    num_cached_tokens    prompt tokens that a prefix hit saved
    num_retractions      running requests that made room for others that were running already
    num_preemptions      running requests that made room for a more urgent one
    num_timed_out        requests that waited or ran too long
    num_arrived          all requests that ever came; those that are not open have been finished,
                         aborted, refused or timed out
    num_prefill_tokens   prompt tokens among the computed tokens
    new_token_ratio      share of outstanding output tokens for which admission keeps room
    cpu_seconds          processor time of the engine's process
    resident_bytes       resident memory of the engine's process
    speculated           how all guesses have fared; None: the engine guesses nothing
    adapters             of LoRA; None: the engine serves none
    media                None: the engine takes only text
    tiers                None: the cache has one tier
    kv_events            None: the engine publishes none
    handovers            None: the engine reads and answers its prompts itself
    routing_key_running_counts  running requests per routing key, for each key that has some
    routing_key_all_counts      running and waiting requests per routing key
    """

    call_id: str
    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    num_leased_pages: int
    num_steps: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_finished: int
    num_aborted: int
    num_refused: int
    num_retractions: int
    num_preemptions: int = 0
    num_timed_out: int = 0
    num_arrived: int = 0
    num_prefill_tokens: int = 0
    new_token_ratio: float = 0.0
    cpu_seconds: float = 0.0
    resident_bytes: int = 0
    speculated: Speculated | None = None
    adapters: AdapterUse | None = None
    media: MediaUse | None = None
    tiers: TierUse | None = None
    kv_events: KVEventCounts | None = None
    handovers: HandoverCounts | None = None
    routing_key_running_counts: tuple[int, ...] = ()
    routing_key_all_counts: tuple[int, ...] = ()
    pools: tuple[PoolUse, ...] = ()


def total_status(statuses: Sequence[EngineStatus]) -> EngineStatus:
    """One status for several engines with the same model: sums, but the mean of a ratio."""
    total: EngineStatus = _total(statuses)
    ratio = sum(status.new_token_ratio for status in statuses) / len(statuses)
    return msgspec.structs.replace(total, call_id="", new_token_ratio=ratio)


def _total(values: Sequence[Any]) -> Any:
    """Numbers added up, structs field by field; lists of structs place by place (all have the same
    pools), other lists one after the other. A value that one lacks is that of the others."""
    some = [value for value in values if value is not None]
    if not some or isinstance(some[0], str):
        return some[0] if some else None
    if isinstance(some[0], msgspec.Struct):
        names = some[0].__struct_fields__
        sums = {name: _total([getattr(value, name) for value in some]) for name in names}
        return msgspec.structs.replace(some[0], **sums)
    if isinstance(some[0], tuple):
        if any(isinstance(item, msgspec.Struct) for item in chain(*some)):
            return tuple(_total(items) for items in zip(*some, strict=True))
        return tuple(chain(*some))
    return sum(some)


EngineOutput = StepOutputs | EngineReady | EngineFatal | CacheFlushed | CallDone | EngineStatus
