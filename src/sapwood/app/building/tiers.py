"""Builds the tiers behind the KV pool: what a rank holds of them, and what decides about them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sapwood.app.building.loading import LoadWatch, timed
from sapwood.app.building.resolving import Resolved
from sapwood.executor.page_copies import PageCopies
from sapwood.memory.tiers.host import HostTier
from sapwood.schema.cache import CachePlan
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.tiers import TiersConfig

GB = 10**9


def host_sizes(cache: CachePlan, pool_sizes: tuple[int, ...], config: TiersConfig) -> list[int]:
    """Slots of each pool on the host: so many times those of the device as were asked for, or as
    fit into the asked memory; one at least. The same on all ranks and stages."""
    cache = replace(cache, held=None)
    device_bytes = sum(
        size * cache.unit_bytes(pool) for pool, size in zip(cache.pools, pool_sizes, strict=True)
    )
    ratio = config.hicache_ratio
    if config.hicache_size and device_bytes:
        ratio = config.hicache_size * GB / device_bytes
    return [max(int(size * ratio), 1) for size in pool_sizes]


def page_copies(
    resolved: Resolved, caches: list[tuple[Tensor, ...]], watch: LoadWatch
) -> PageCopies | None:
    """This rank's part of the host tier; None: there is none."""
    config = resolved.config.tiers
    if not config.enable_hierarchical_cache:
        return None
    watch.beat("allocating the host's pool of prefixes")
    sizes = host_sizes(resolved.cache, resolved.pool_sizes, config)
    with timed("host pool"):
        copies = PageCopies(resolved.cache.groups, caches, sizes)
    num_bytes = sum(pool.page_bytes * size for pool, size in zip(copies.pools, sizes, strict=True))
    why = f"{num_bytes / 2**20:.1f} MiB of the host's memory, written {config.write_policy}"
    resolved.decisions.append(
        Decision("host_tier_tokens", sizes[0] * resolved.config.memory.page_size, why)
    )
    return copies


def host_tier(resolved: Resolved) -> HostTier | None:
    """What decides which pages the host has; None: it has none."""
    config = resolved.config.tiers
    if not config.enable_hierarchical_cache:
        return None
    sizes = host_sizes(resolved.cache, resolved.pool_sizes, config)
    return HostTier(sizes, config.write_policy)
