"""The host tier: a second memory for pages and states, behind the pools that steps compute in.

It hears what the tree keeps, uses and gives away, and decides which bytes are copied to the host.
The copies are made by the ranks, as part of a plan: first those to the host, then those from it,
then the step. So a page that was given away in this turn still has its bytes when it is copied, and
a page that comes back is there before the step that reads it. Each pool has copies of its own,
because pages, windows and states are given away at different times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from sapwood.memory.listener import Stretch
from sapwood.memory.tiers.slots import CopySlots, PageCopy
from sapwood.schema.config.tiers import WritePolicy
from sapwood.schema.step import CopiedPage

Copies = Sequence[tuple[bytes, PageCopy]]
"""Each with its page's digest, the last page first."""


class HostListener(Protocol):
    """Hears which pages the host has."""

    def saved(self, stretch: Stretch, copies: Copies) -> None:
        """The next plan copies these pages to the host."""
        ...

    def dropped(self, pool: int, digest: bytes) -> None:
        """The host has a page no longer, or never got what its slot was for."""
        ...


class HostTier:
    """Copies of pages by digest, one set of slots per pool.

    num_saved, num_restored  pages and states that were copied to the host, and back
    """

    def __init__(self, sizes: Sequence[int], policy: WritePolicy) -> None:
        """sizes  slots of each pool"""
        self.policy = policy
        self.slots = [CopySlots(size, partial(self._dropped, at)) for at, size in enumerate(sizes)]
        self.num_saved = 0
        self.num_restored = 0
        self.listeners: list[HostListener] = []
        self._saves: list[CopiedPage] = []
        self._loads: list[CopiedPage] = []
        self._moving: list[tuple[int, PageCopy]] = []
        """Of the next plan; their slots are pinned until it was executed, since a thread may fill
        any other slot at any time."""
        self._in_plans: dict[int, list[tuple[int, PageCopy]]] = {}

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
        self._pin(pool, copy)
        self._loads.append(CopiedPage(pool, copy.slot, number))
        self.num_restored += 1
        return copy.was_stored

    def take_orders(self, step: int) -> tuple[list[CopiedPage], list[CopiedPage]]:
        """(copies to the host, copies back) of the plan of that number, told once."""
        orders = self._saves, self._loads
        if self._moving:
            self._in_plans[step] = self._moving
        self._saves, self._loads, self._moving = [], [], []
        return orders

    def executed(self, step: int) -> None:
        """The copies of that plan are made: their slots may get other pages."""
        for pool, copy in self._in_plans.pop(step, ()):
            self.slots[pool].unpin(copy)

    def clear(self) -> None:
        """Forget all copies: they are of other weights, or somebody asked for it."""
        for pool, copy in self._moving:
            self.slots[pool].unpin(copy)
        self._saves, self._loads, self._moving = [], [], []
        for slots in self.slots:
            slots.clear()

    def _pin(self, pool: int, copy: PageCopy) -> None:
        self.slots[pool].pin(copy)
        self._moving.append((pool, copy))

    def _dropped(self, pool: int, digest: bytes) -> None:
        for one in self.listeners:
            one.dropped(pool, digest)

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
            self._pin(pool, copy)
            self._saves.append(CopiedPage(pool, number, copy.slot))
            self.num_saved += 1
            new.append((digest, copy))
        for one in self.listeners if new else ():
            one.saved(stretch, new)
