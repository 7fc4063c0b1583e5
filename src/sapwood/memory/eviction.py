"""Which unused prefix is forgotten first."""

from __future__ import annotations

from collections.abc import Callable

from sapwood.schema.config.memory import EvictionPolicy

EvictionKey = tuple[int, int]
"""The node with the smallest key goes first."""


def least_recently_used(num_hits: int, last_used: int) -> EvictionKey:
    return (last_used, 0)


def least_frequently_used(num_hits: int, last_used: int) -> EvictionKey:
    """Fewest hits first; among equals the one used longest ago."""
    return (num_hits, last_used)


def _key_function(policy: EvictionPolicy) -> Callable[[int, int], EvictionKey]:
    match policy:
        case EvictionPolicy.LRU:
            return least_recently_used
        case EvictionPolicy.LFU:
            return least_frequently_used


EVICTION_POLICIES: dict[str, Callable[[int, int], EvictionKey]] = {
    policy: _key_function(policy) for policy in EvictionPolicy
}
"""Name -> function from (num_hits, last_used) to the key; `last_used` counts uses, not seconds."""
