"""What /metrics is told about an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Speculated(Protocol):
    """How guesses have fared; explained in `schema.output.Speculated`."""

    @property
    def accept_length(self) -> float: ...
    @property
    def draft_length(self) -> float: ...
    @property
    def accept_rate(self) -> float: ...


class AdapterFigures(Protocol):
    """LoRA adapters in memory; explained in `schema.output.AdapterUse`."""

    @property
    def num_used(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def num_evictions(self) -> int: ...
    @property
    def utilization(self) -> float: ...


class KVEventFigures(Protocol):
    """Events of the prefix cache; explained in `schema.output.KVEventCounts`."""

    @property
    def num_published(self) -> int: ...
    @property
    def num_dropped(self) -> int: ...


class PoolFigures(Protocol):
    """How many pages, or slots of states, of a pool are free, and how many requests hold."""

    @property
    def num_free(self) -> int: ...
    @property
    def num_leased(self) -> int: ...


class MediaFigures(Protocol):
    """See schema.output.MediaUse."""

    @property
    def num_encoded(self) -> int: ...
    @property
    def num_shared(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def encoding_s(self) -> float: ...


class TierFigures(Protocol):
    """The tiers of the cache; the fields are explained in `schema.output.TierUse`."""

    @property
    def num_host_tokens(self) -> int: ...
    @property
    def num_stored_tokens(self) -> int: ...
    @property
    def num_host_pages(self) -> int: ...
    @property
    def num_host_slots(self) -> int: ...
    @property
    def num_saved(self) -> int: ...
    @property
    def num_restored(self) -> int: ...
    @property
    def num_written(self) -> int: ...
    @property
    def num_read(self) -> int: ...
    @property
    def num_missed(self) -> int: ...
    @property
    def num_unwritten(self) -> int: ...
    @property
    def num_failures(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def write_s(self) -> float: ...
    @property
    def read_s(self) -> float: ...


class EngineFacts(Protocol):
    """An engine's report on itself; the fields are explained in `schema.output.EngineStatus`."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_free_pages(self) -> int: ...
    @property
    def num_leased_pages(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_prefill_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_retractions(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def new_token_ratio(self) -> float: ...
    @property
    def speculated(self) -> Speculated | None: ...
    @property
    def adapters(self) -> AdapterFigures | None: ...
    @property
    def media(self) -> MediaFigures | None: ...
    @property
    def tiers(self) -> TierFigures | None: ...
    @property
    def kv_events(self) -> KVEventFigures | None: ...
    @property
    def cpu_seconds(self) -> float: ...
    @property
    def resident_bytes(self) -> int: ...
    @property
    def routing_key_running_counts(self) -> Sequence[int]: ...
    @property
    def routing_key_all_counts(self) -> Sequence[int]: ...
    @property
    def pools(self) -> Sequence[PoolFigures]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConstants:
    """A pool of the cache, as `schema.output.PoolFacts` says."""

    name: str
    size: int
    unit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConstants:
    """Facts that an engine reports once, when it is ready.

    startup_s     seconds from the engine process's start to its first message
    load_s        seconds that loading the weights took
    weight_bytes  memory that loading the weights took; 0: unknown
    pools         of the cache
    """

    page_size: int
    max_total_tokens: int
    max_running_requests: int
    startup_s: float
    load_s: float
    weight_bytes: int
    pools: tuple[PoolConstants, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRates:
    """Tokens per second in the latest interval.

    last_output_tokens_per_s  in the latest interval with any output tokens
    prompt_tokens_per_s  that were computed
    cached_tokens_per_s  of prompts, that the cache had
    """

    output_tokens_per_s: float = 0.0
    last_output_tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    cached_tokens_per_s: float = 0.0

    @property
    def cache_hit_rate(self) -> float | None:
        """The cached share of prompt tokens; None: there were none."""
        both = self.prompt_tokens_per_s + self.cached_tokens_per_s
        return self.cached_tokens_per_s / both if both else None


@dataclass(slots=True)
class EngineState:
    """The latest known facts about an engine; None: no report has come yet.

    is_up  whether it serves
    """

    is_up: bool = True
    facts: EngineFacts | None = None
    constants: EngineConstants | None = None
    rates: EngineRates = field(default_factory=EngineRates)
