"""Builds the tiers behind the KV pool: what a rank holds of them, and what decides about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sapwood.app.building.loading import LoadWatch, timed
from sapwood.app.building.resolving import Resolved
from sapwood.base.clock import Clock
from sapwood.base.errors import ConfigError
from sapwood.engine.adapters import AdapterSlots
from sapwood.engine.shared_names import SharedNames
from sapwood.engine.stored_pages import StoredPages
from sapwood.engine.tier_desk import TierDesk
from sapwood.engine.tiers import CacheTiers
from sapwood.executor.page_copies import PageCopies, copied_beside
from sapwood.memory.kv_events import KVEventSource
from sapwood.memory.ledger import Ledger
from sapwood.memory.storage.interface import PageStorage, StorageUser
from sapwood.memory.storage.names import CopyNames
from sapwood.memory.storage.opening import open_storage
from sapwood.memory.storage.parts import OwnParts, PageParts
from sapwood.memory.tiers.host import HostTier
from sapwood.memory.tiers.rates import CostRule, Rate
from sapwood.models.config import DecoderConfig
from sapwood.schema.cache import CachePlan
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.tiers import TiersConfig
from sapwood.schema.env import environment, hicache_directory

GB = 10**9
LAYOUT = "1"
"""Changes when the same page has other bytes than before."""
LEAST_PAGE = 8
"""Tokens of a page that is worth a file of its own."""
NUM_SAMPLES, SAMPLE_BYTES = 16, 1 << 16


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
    resolved: Resolved,
    caches: list[tuple[Tensor, ...]],
    arriving: Sequence[tuple[Tensor, ...]],
    watch: LoadWatch,
) -> PageCopies | None:
    """This rank's part of the host tier; None: there is none.

    arriving  the caches that the model's layers read"""
    config = resolved.config.tiers
    if not config.enable_hierarchical_cache:
        return None
    watch.beat("allocating the host's pool of prefixes")
    sizes = host_sizes(resolved.cache, resolved.pool_sizes, config)
    with timed("host pool"):
        copies = PageCopies(
            resolved.cache.groups,
            caches,
            sizes,
            resolved.kernels.kernels.carry_rows,
            beside=copied_beside(resolved.device, arriving),
        )
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


def own_parts(resolved: Resolved, copies: PageCopies, rank: int) -> OwnParts:
    """The storage as this rank uses it, for its part of every page."""
    return OwnParts(
        [pool.rows.numpy() for pool in copies.pools],
        partial(_opened, resolved, rank),
        rank=rank,
        num_ranks=resolved.config.parallel.num_ranks,
    )


def cache_tiers(
    resolved: Resolved,
    ledger: Ledger,
    host: HostTier,
    copies: PageCopies,
    parts: PageParts,
    clock: Clock,
    adapters: AdapterSlots | None,
    events: KVEventSource | None,
) -> CacheTiers:
    """What the scheduler asks of the tiers, and the storage behind the host where one is named.

    Raises ConfigError if it cannot be used"""
    config, shape = resolved.config, resolved.shape
    token = Rate()
    has_lengths = isinstance(shape, DecoderConfig) and shape.switch_length is not None
    stored = StoredPages(
        host,
        ledger.needs,
        parts,
        clock,
        CostRule(Rate(), token),
        CopyNames(resolved.files.name, identity_of(resolved), resolved.cache.pools),
        config.tiers.prefetch,
        SharedNames(
            no_content if adapters is None else adapters.content_of, has_lengths=has_lengths
        ),
        events=events,
    )
    if events is not None:
        host.listeners.append(events)
    tiers = CacheTiers(
        ledger,
        host,
        stored=stored,
        loads=CostRule(copies.loading, token),
        page_bytes=sum(pool.page_bytes for pool in copies.pools),
        clock=clock,
    )
    backend = config.tiers.hicache_storage_backend
    if backend is not None:
        stored.attach(backend, config.tiers.extra)
    return tiers


def no_content(adapter_id: str) -> None:
    """Of adapters where there can be none."""
    del adapter_id


def tier_desk(resolved: Resolved, tiers: CacheTiers | None) -> TierDesk:
    """What carries out orders about the storage."""
    return TierDesk(tiers, resolved.config.tiers)


def _opened(resolved: Resolved, rank: int, backend: str, extra: Mapping[str, Any]) -> PageStorage:
    """ConfigError if the storage cannot be used."""
    page_size = resolved.config.memory.page_size
    if page_size < LEAST_PAGE:
        raise ConfigError(
            f"a storage keeps each page by itself, and --page-size {page_size} makes them too "
            f"small; take at least {LEAST_PAGE}"
        )
    parallel = resolved.config.parallel
    user = StorageUser(
        default_directory=hicache_directory(environment()),
        model=resolved.files.name,
        tp_rank=rank % parallel.tp_size,
        tp_size=parallel.tp_size,
        pp_rank=resolved.stage.index,
        pp_size=parallel.pp_size,
    )
    return open_storage(backend, extra, user)


def identity_of(resolved: Resolved) -> str:
    """A digest of all that the bytes of a page depend on besides its tokens."""
    config, told = resolved.config, hashlib.sha256()
    parts: list[object] = [
        LAYOUT,
        replace(config.model, model="model", served_model_name="model"),
        resolved.shape,
        resolved.cache.groups,
        config.memory.page_size,
        config.memory.kv_cache_dtype,
        config.speculation,
        config.execution.kernels,
        config.execution.cpu_products,
        config.scheduler.random_seed if config.model.load_format == "dummy" else "",
    ]
    parallel = config.parallel
    division = parallel.tp_size, parallel.pp_size, parallel.ep_size, parallel.enable_dp_attention
    if division != (1, 1, 1, False):  # sums are in another order, and parts are others
        parts += [division, parallel.pp_layer_partition]
    for part in parts:
        told.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
    drafts = () if resolved.draft is None else resolved.draft.files.weights
    for path in (*resolved.files.weights, *drafts):
        told.update(_fingerprint(path))
    return told.hexdigest()


def _fingerprint(path: Path) -> bytes:
    """Of a file of weights: its size, when it was changed, and some of its content."""
    status = path.stat()
    told = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for at in range(NUM_SAMPLES):
            file.seek(status.st_size * at // NUM_SAMPLES)
            told.update(file.read(SAMPLE_BYTES))
    return told.digest()
