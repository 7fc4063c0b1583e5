"""The host tier: a second memory for pages and states, behind the pools that steps compute in.

It hears what the tree keeps, uses and gives away, and decides which bytes are copied to the host.
The copies are made by the ranks, as part of a plan: first those to the host, then those from it,
then the step. So a page that was given away in this turn still has its bytes when it is copied, and
a page that comes back is there before the step that reads it. Each pool has copies of its own,
because pages, windows and states are given away at different times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from sapwood.memory.listener import Stretch
from sapwood.memory.tiers.slots import CopySlots, PageCopy
from sapwood.schema.config.tiers import WritePolicy
from sapwood.schema.step import CopiedPage

OnSaved = Callable[[Stretch, Sequence[tuple[bytes, PageCopy]]], None]
"""Told of copies that the next plan makes, each with its page's digest, the last page first."""


class HostTier:
    """Copies of pages by digest, one set of slots per pool.

    num_saved, num_restored  pages and states that were copied to the host, and back
    """

    def __init__(self, sizes: Sequence[int], policy: WritePolicy) -> None:
        """sizes  slots of each pool"""
        self.policy = policy
        self.slots = [CopySlots(size) for size in sizes]
        self.num_saved = 0
        self.num_restored = 0
        self.on_saved: OnSaved | None = None
        self._saves: list[CopiedPage] = []
        self._loads: list[CopiedPage] = []
        self._loading: list[tuple[int, PageCopy]] = []

    # ---- what the tree tells ------------------------------------------------------------------

    def stored(self, stretch: Stretch) -> None:
        if self.policy is WritePolicy.WRITE_THROUGH:
            self._save(stretch)

    def evicted(self, stretch: Stretch) -> None:
        if self.policy is not WritePolicy.WRITE_THROUGH_SELECTIVE:
            self._save(stretch)

    def removed(self, stretch: Stretch) -> None:
        # A request takes the state over; or all is forgotten, and `clear` follows.
        self.evicted(stretch)

    def used(self, stretch: Stretch) -> None:
        if self.policy is WritePolicy.WRITE_THROUGH_SELECTIVE:
            self._save(stretch)

    def cleared(self) -> None:
        pass  # whoever forgets the device's pages clears this tier too

    # ---- copies --------------------------------------------------------------------------------

    @property
    def has_orders(self) -> bool:
        """Whether the next plan has something to copy."""
        return bool(self._saves or self._loads)

    def has(self, pool: int, digest: bytes) -> bool:
        return digest in self.slots[pool]

    @contextmanager
    def keeping(self, wanted: Iterable[tuple[int, bytes]]) -> Iterator[None]:
        """Let none of these copies go meanwhile.

        wanted  (pool, digest); those that the host does not have are passed over"""
        found = [(self.slots[pool], self.slots[pool].find(digest)) for pool, digest in wanted]
        kept = [(slots, copy) for slots, copy in found if copy is not None]
        for slots, copy in kept:
            slots.pin(copy)
        try:
            yield
        finally:
            for slots, copy in kept:
                slots.unpin(copy)

    def load(self, pool: int, digest: bytes, number: int) -> bool:
        """Let the next plan fill that page or slot of the device; the copy must be there. Returns
        whether its bytes came from the storage."""
        copy = self.slots[pool].find(digest)
        assert copy is not None, "the copy was asked for before"
        assert copy.is_filled, "the copy is on its way"
        self.slots[pool].touch(digest)
        self.slots[pool].pin(copy)
        self._loading.append((pool, copy))
        self._loads.append(CopiedPage(pool, copy.slot, number))
        self.num_restored += 1
        return copy.was_stored

    def take_orders(self) -> tuple[list[CopiedPage], list[CopiedPage]]:
        """(copies to the host, copies back) of the next plan, told once. Later plans may use these
        slots for other pages."""
        orders = self._saves, self._loads
        self._forget_orders()
        return orders

    def clear(self) -> None:
        """Forget all copies: they are of other weights, or somebody asked for it."""
        self._forget_orders()
        for slots in self.slots:
            slots.clear()

    def _forget_orders(self) -> None:
        for pool, copy in self._loading:
            self.slots[pool].unpin(copy)
        self._saves, self._loads, self._loading = [], [], []

    def _save(self, stretch: Stretch) -> None:
        pool = stretch.pool
        slots = self.slots[pool]
        # The first page last: a prefix is of use only together with the pages before.
        pairs = zip(reversed(stretch.digests), reversed(stretch.numbers), strict=True)
        new = []
        for digest, number in pairs:
            known = slots.find(digest)
            if known is not None and known.is_filled:
                slots.touch(digest)
                continue
            if known is not None:
                continue  # it is on its way from storage
            copy = slots.add(digest)
            if copy is None:
                break
            self._saves.append(CopiedPage(pool, number, copy.slot))
            self.num_saved += 1
            new.append((digest, copy))
        if self.on_saved is not None:
            self.on_saved(stretch, new)
