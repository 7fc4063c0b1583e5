"""Which unused prefix is forgotten first."""

from __future__ import annotations

from collections.abc import Callable

EvictionKey = tuple[int, int]
"""The node with the smallest key goes first."""


def least_recently_used(num_hits: int, last_used: int) -> EvictionKey:
    return (last_used, 0)


def least_frequently_used(num_hits: int, last_used: int) -> EvictionKey:
    """Fewest hits first; among equals the one used longest ago."""
    return (num_hits, last_used)


EVICTION_POLICIES: dict[str, Callable[[int, int], EvictionKey]] = {
    "lru": least_recently_used,
    "lfu": least_frequently_used,
}
"""Name to key function of (num_hits, last_used); `last_used` counts uses, not seconds."""
