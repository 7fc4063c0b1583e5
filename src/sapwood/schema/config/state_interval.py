"""How far apart the states are that are kept for prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import CacheGroup, CacheKind
from sapwood.schema.config.memory import MemoryConfig

ON_CPU, ON_GPU = 256, 1024
"""Tokens. A GPU wants larger steps, and a step of a prompt ends where a state is kept."""


def state_interval(
    asked: MemoryConfig,
    page_size: int,
    *,
    groups: Sequence[CacheGroup],
    model: str,
    on_cpu: bool,
) -> tuple[int | None, str | None]:
    """Tokens between kept states, and why so many.

    groups, model  cache groups and name of the model
    Returns        (None, None) if the model keeps no states; a number that was asked for has no
                   reason
    Raises         ConfigError if a number that was asked for does not suit the model or the pages
    """
    interval = asked.mamba_track_interval
    keeps_states = any(group.kind is CacheKind.STATE for group in groups)
    if not keeps_states:
        for flag, value in (
            ("--mamba-track-interval", interval),
            ("--max-mamba-cache-size", asked.max_mamba_cache_size),
        ):
            if value is not None:
                raise ConfigError(
                    f"{flag} is {value}, but the layers of {model} keep no states; leave the "
                    "option out"
                )
        return None, None
    if interval is None:
        whole = -(-(ON_CPU if on_cpu else ON_GPU) // page_size) * page_size
        reason = "how much of a prefix is computed again at most; a step of a prompt ends there"
        return whole, reason
    if interval % page_size:
        raise ConfigError(
            f"--mamba-track-interval is {interval} but must be a multiple of --page-size "
            f"{page_size}, because prefixes are shared in whole pages"
        )
    return interval, None
