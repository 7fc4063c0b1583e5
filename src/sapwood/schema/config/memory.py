"""How much KV the pool holds, and how prefixes are kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sapwood.base.dtypes import DTYPE_BYTES, KV_CACHE_8_BIT
from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option
from sapwood.schema.kv_events import KVEventsConfig


class EvictionPolicy(StrEnum):
    LRU = "lru"
    LFU = "lfu"


class StateStrategy(StrEnum):
    """Where the states that prefixes begin with are kept.

    AUTO          as EXTRA_BUFFER
    NO_BUFFER     at the end of each prompt
    EXTRA_BUFFER  there, and every --mamba-track-interval tokens
    """

    AUTO = "auto"
    NO_BUFFER = "no_buffer"
    EXTRA_BUFFER = "extra_buffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How much KV the pool holds, as asked."""

    page_size: int | None = option(
        None, "Tokens of KV per page; prefixes are shared in whole pages.", unit="tokens"
    )
    max_total_tokens: int | None = option(
        None, "Tokens that the KV pool holds; overrides --mem-fraction-static.", unit="tokens"
    )
    kv_cache_dtype: str = option(
        "auto",
        "Numbers of the KV cache; auto: those of --dtype. The 8-bit ones have a scale per token "
        "and head, and fit almost twice the tokens of bfloat16 into the pool.",
        choices=("auto", *DTYPE_BYTES, *KV_CACHE_8_BIT),
    )
    mem_fraction_static: float | None = option(
        None, "Fraction of the machine's memory for weights and KV pool together."
    )
    disable_radix_cache: bool = option(
        False,
        "Keep no prefixes: every prompt is computed whole. For comparison.",
        aliases=["disable-prefix-cache"],
    )
    swa_full_tokens_ratio: float | None = option(
        None,
        "Tokens that the pool of a sliding window holds, relative to the pool of all tokens, for "
        "models with windows: more keep more prefixes, less saves memory. Default: what running "
        "requests use at once.",
    )
    mamba_track_interval: int | None = option(
        None,
        "Tokens between the states that are kept for prefixes, for models whose layers keep a "
        "state instead of keys and values (LFM2, Qwen3-Next); a multiple of --page-size. A step of "
        "a prompt ends at each such place.",
        unit="tokens",
        aliases=["state-interval"],
    )
    max_mamba_cache_size: int | None = option(
        None,
        "States that the pool of states holds, for such models: one for each running request, and "
        "those that are kept for prefixes.",
        unit="states",
    )
    mamba_full_memory_ratio: float | None = option(
        None,
        "Memory that the states kept for prefixes take at most, relative to that of all pages of "
        "keys and values, for such models; --max-mamba-cache-size says a number instead. "
        "Default: 1.",
    )
    mamba_ssm_dtype: str = option(
        "float32",
        "Numbers of recurrent states, for models that keep some. bfloat16 takes half the memory, "
        "and rounds a state at the end of each step.",
        choices=("float32", "bfloat16"),
    )
    mamba_scheduler_strategy: str = option(
        "auto",
        "Where states are kept for prefixes: no_buffer, at the end of each prompt only, so that "
        "no step is cut for them; extra_buffer, also every --mamba-track-interval tokens, so that "
        "prompts with a common beginning share it. auto: extra_buffer.",
        choices=tuple(StateStrategy),
    )
    radix_eviction_policy: str = option(
        "lru", "Which unused prefix is forgotten first.", choices=tuple(EvictionPolicy)
    )

    enable_memory_saver: bool = option(
        False,
        "Let /release_memory_occupation give the memory of weights and KV pool back to the system "
        "while the server is idle, on a CPU.",
    )
    enable_weights_cpu_backup: bool = option(
        False,
        "Keep released weights in a temporary file, from which they come back. Default: they come "
        "from their checkpoint, or with the next update.",
    )
    kv_events_config: str | None = option(
        None,
        "Publish what the prefix cache holds, for routers, as JSON: publisher (zmq or null), "
        "endpoint, replay_endpoint, topic, buffer_steps, hwm and max_queue_size. Whoever can reach "
        "the endpoint reads the tokens of all prompts. Default: nothing is published.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.kv_events.is_on and self.disable_radix_cache:
            raise ConfigError(
                "--kv-events-config tells of prefixes that are kept, and --disable-radix-cache "
                "keeps none; leave one out"
            )
        if self.enable_weights_cpu_backup and not self.enable_memory_saver:
            raise ConfigError(
                "--enable-weights-cpu-backup keeps weights that are released, and without "
                "--enable-memory-saver none are; add that, or leave it out"
            )
        if self.page_size is not None and not 1 <= self.page_size <= 1024:
            raise ConfigError(f"--page-size is {self.page_size} but must be from 1 to 1024")
        if self.max_total_tokens is not None and self.max_total_tokens < 1:
            raise ConfigError(f"--max-total-tokens is {self.max_total_tokens} but must be >= 1")
        for flag, value in (
            ("--mamba-track-interval", self.mamba_track_interval),
            ("--max-mamba-cache-size", self.max_mamba_cache_size),
        ):
            if value is not None and not 1 <= value < 2**31:
                raise ConfigError(f"{flag} is {value} but must be from 1 to {2**31 - 1}")
        ratio = self.mamba_full_memory_ratio
        if ratio is not None and not 0.0 < ratio <= 1e6:
            raise ConfigError(f"--mamba-full-memory-ratio is {ratio} but must be above 0")
        if ratio is not None and self.max_mamba_cache_size is not None:
            raise ConfigError(
                "--mamba-full-memory-ratio and --max-mamba-cache-size both say how many states "
                "there are; leave one out"
            )
        share = self.swa_full_tokens_ratio
        if share is not None and not 0.0 < share <= 1.0:
            raise ConfigError(f"--swa-full-tokens-ratio is {share} but must be above 0, up to 1")
        fraction = self.mem_fraction_static
        if fraction is not None and not 0.0 < fraction < 1.0:
            raise ConfigError(f"--mem-fraction-static is {fraction} but must be between 0 and 1")

    @property
    def kv_events(self) -> KVEventsConfig:
        return KVEventsConfig.parse(self.kv_events_config)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedMemory(MemoryConfig):
    """After resolution: the pool has a size, and `kv_cache_dtype` is not "auto".

    mamba_track_interval  None: the model keeps no states; with the strategy no_buffer, as long as
                          the context
    max_mamba_cache_size  None: so many as `CachePlan` says
    """

    page_size: int
    max_total_tokens: int
