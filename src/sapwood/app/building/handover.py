"""Builds an engine's part in prompts that one engine reads and another one answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from sapwood.app.building.loading import LoadWatch, timed
from sapwood.app.building.resolving import Resolved
from sapwood.app.building.tiers import identity_of, no_content
from sapwood.base.clock import Clock
from sapwood.base.errors import ConfigError
from sapwood.distributed.transfer.facts import PageFacts
from sapwood.distributed.transfer.receiving import PageReceiver
from sapwood.distributed.transfer.sending import PageSender
from sapwood.engine.adapters import AdapterSlots
from sapwood.engine.arrivals import Arrivals
from sapwood.engine.departures import Departures
from sapwood.engine.handovers import Handovers
from sapwood.engine.prompt_digest import PromptDigests
from sapwood.engine.tiers import CacheTiers
from sapwood.executor.page_copies import PageCopies, PageMemory, copied_beside
from sapwood.memory.ledger import Ledger
from sapwood.memory.tiers.host import HostTier
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.disaggregation import Part
from sapwood.schema.config.tiers import WritePolicy
from sapwood.schema.env import environment, handover_wait_s, pages_wait_s


def page_memory(resolved: Resolved, caches: list[tuple[Tensor, ...]]) -> PageMemory | None:
    """What an engine that reads prompts sends pages from; None: this one does not."""
    if resolved.config.disaggregation.part is not Part.PREFILL:
        return None
    return PageMemory(resolved.cache.groups, caches)


def landing_copies(
    resolved: Resolved,
    caches: list[tuple[Tensor, ...]],
    arriving: Sequence[tuple[Tensor, ...]],
    watch: LoadWatch,
) -> PageCopies | None:
    """The host's memory into which pages of other engines come; None: none do.

    arriving  the caches that the model's layers read"""
    config = resolved.config.disaggregation
    if config.part is not Part.DECODE:
        return None
    watch.beat("allocating the memory for pages of other engines")
    backend = config.disaggregation_transfer_backend
    sizes = list(resolved.pool_sizes)
    make_copies = partial(
        PageCopies,
        resolved.cache.groups,
        caches,
        sizes,
        resolved.kernels.kernels.carry_rows,
        beside=copied_beside(resolved.device, arriving),
    )
    with timed("memory for pages"):
        try:
            is_shared = backend in ("auto", "shared_memory")
            copies = make_copies(is_shared=is_shared)
        except OSError as error:
            if backend == "shared_memory":
                raise ConfigError(
                    f"this system has no memory that two engines can share ({error}); take "
                    "--disaggregation-transfer-backend tcp"
                ) from None
            copies = make_copies()
    num_bytes = sum(pool.page_bytes * size for pool, size in zip(copies.pools, sizes, strict=True))
    why = f"up to {num_bytes / 2**20:.1f} MiB of the host's memory, as many pages as the pool has"
    tokens = sizes[0] * resolved.config.memory.page_size
    resolved.decisions.append(Decision("landing_tokens", tokens, why))
    return copies


def landing_tier(resolved: Resolved) -> HostTier | None:
    """What knows which pages have come; None: none do. It hears nothing of what the tree keeps, so
    it saves nothing."""
    if resolved.config.disaggregation.part is not Part.DECODE:
        return None
    return HostTier(resolved.pool_sizes, WritePolicy.WRITE_BACK)


def landing_tiers(
    resolved: Resolved,
    ledger: Ledger,
    landing: HostTier,
    copies: PageCopies,
    adapters: AdapterSlots | None,
) -> tuple[CacheTiers, Arrivals]:
    """What the scheduler asks for pages of other engines."""
    config = resolved.config.disaggregation
    receiver = None
    if config.disaggregation_transfer_backend != "fake":
        facts = _facts(resolved, tuple(pool.page_bytes for pool in copies.pools))
        receiver = PageReceiver(
            facts,
            [pool.rows.numpy() for pool in copies.pools],
            None if copies.segment is None else copies.segment.place,
            needs_segment=config.disaggregation_transfer_backend == "shared_memory",
            checks=config.disaggregation_checksums,
            wait_s=pages_wait_s(environment()),
        )
    arrivals = Arrivals(landing, receiver, config, _digests(adapters))
    return CacheTiers(ledger, landing, least_tokens=1, arrivals=arrivals), arrivals


def departures(
    resolved: Resolved,
    ledger: Ledger,
    pages: PageMemory | None,
    clock: Clock,
    adapters: AdapterSlots | None,
) -> Departures | None:
    """What sends pages to other engines; None: nothing does. ConfigError if nobody can listen at
    the port for them"""
    config = resolved.config.disaggregation
    if pages is None:
        return None
    sender = None
    if config.disaggregation_transfer_backend != "fake":
        sender = PageSender(
            config.disaggregation_bootstrap_host or "127.0.0.1",
            config.disaggregation_bootstrap_port,
            _facts(resolved, pages.row_bytes),
        )
        why = "where other engines ask for pages"
        resolved.decisions.append(Decision("disaggregation_bootstrap_port", sender.port, why))
    wait_s = handover_wait_s(environment())
    return Departures(ledger, sender, pages.read, clock, _digests(adapters), wait_s=wait_s)


def _digests(adapters: AdapterSlots | None) -> PromptDigests:
    return PromptDigests(no_content if adapters is None else adapters.content_of)


def handovers_of(
    resolved: Resolved, departures: Departures | None, arrivals: Arrivals | None
) -> Handovers:
    reserved = resolved.config.disaggregation.num_reserved_decode_tokens
    return Handovers(
        departures=departures,
        arrivals=arrivals,
        num_reserved_tokens=0 if arrivals is None else reserved,
    )


def _facts(resolved: Resolved, row_bytes: tuple[int, ...]) -> PageFacts:
    page_size = resolved.config.memory.page_size
    return PageFacts(identity=identity_of(resolved), page_size=page_size, row_bytes=row_bytes)
