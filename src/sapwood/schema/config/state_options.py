"""How states are kept for prefixes: how far apart, and in which numbers."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import RECURRENT, CacheGroup, CacheKind
from sapwood.schema.config.memory import MemoryConfig, StateStrategy

ON_CPU, ON_GPU = 256, 1024
"""Tokens. A GPU wants larger steps, and a step of a prompt ends where a state is kept."""


def refuse_idle_state_options(
    asked: MemoryConfig, groups: Sequence[CacheGroup], *, model: str
) -> None:
    """ConfigError if an option says how states are kept, and the model keeps none.

    groups, model  cache groups and name of the model
    """
    states = [group for group in groups if group.kind is CacheKind.STATE]
    tensors = [tensor for group in states for tensor in group.tensors.values()]
    lacks_matrices = not any(tensor.dtype == RECURRENT for tensor in tensors)
    if asked.mamba_ssm_dtype != "float32" and lacks_matrices:
        raise ConfigError(
            f"--mamba-ssm-dtype is {asked.mamba_ssm_dtype}, but the layers of {model} keep no "
            "recurrent states; leave the option out"
        )
    for flag, value in (
        ("--mamba-track-interval", asked.mamba_track_interval),
        ("--max-mamba-cache-size", asked.max_mamba_cache_size),
        ("--mamba-full-memory-ratio", asked.mamba_full_memory_ratio),
        ("--mamba-scheduler-strategy", asked.mamba_scheduler_strategy),
    ):
        if not states and value not in (None, StateStrategy.AUTO):
            raise ConfigError(
                f"{flag} is {value}, but the layers of {model} keep no states; leave the option out"
            )


def state_interval(
    asked: MemoryConfig, page_size: int, *, context_length: int, on_cpu: bool
) -> tuple[int, str | None]:
    """Tokens between the kept states of a model that keeps states, and why so many.

    Returns  no reason for a number that was asked for
    Raises   ConfigError if a number that was asked for does not suit the pages or the strategy
    """
    interval = asked.mamba_track_interval
    if asked.mamba_scheduler_strategy == StateStrategy.NO_BUFFER:
        if interval is not None:
            raise ConfigError(
                "--mamba-scheduler-strategy no_buffer keeps states at the ends of prompts only; "
                "leave --mamba-track-interval out, or choose extra_buffer"
            )
        # No place inside the context is such a multiple: only ends of prompts are left.
        return _whole_pages(context_length, page_size), (
            "--mamba-scheduler-strategy no_buffer keeps states at the ends of prompts only"
        )
    if interval is None:
        return _whole_pages(ON_CPU if on_cpu else ON_GPU, page_size), (
            "how much of a prefix is computed again at most; a step of a prompt ends there"
        )
    if interval % page_size:
        raise ConfigError(
            f"--mamba-track-interval is {interval} but must be a multiple of --page-size "
            f"{page_size}, because prefixes are shared in whole pages"
        )
    return interval, None


def _whole_pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size) * page_size
