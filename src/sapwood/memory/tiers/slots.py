"""Which page copies a host pool has, and in which of its slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class PageCopy:
    """The bytes of one page, or of one state, of one pool.

    slot          of the host pool
    num_pins      those who read or write the slot, so that it must not go to another page
    is_filled     whether the slot has the bytes, or will have when the plans so far are executed
    was_stored    whether the bytes came from the storage
    is_forgotten  whether nobody may find it any more; its slot is free when it is not pinned
    """

    slot: int
    num_pins: int = 0
    is_filled: bool = True
    was_stored: bool = False
    is_forgotten: bool = False


class CopySlots:
    """The slots of one host pool, by the digest of the page; the copy that was of use longest ago
    goes first."""

    def __init__(self, num_slots: int, on_drop: Callable[[bytes], None]) -> None:
        """on_drop  is told each page whose copy is forgotten"""
        self.num_slots = num_slots
        self._on_drop = on_drop
        self._free = list(range(num_slots - 1, -1, -1))
        self._copies: OrderedDict[bytes, PageCopy] = OrderedDict()
        self._num_pinned = 0

    @property
    def num_available(self) -> int:
        """Slots that another page can have."""
        return self.num_slots - self._num_pinned

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, digest: bytes) -> bool:
        copy = self._copies.get(digest)
        return copy is not None and copy.is_filled

    def find(self, digest: bytes) -> PageCopy | None:
        """The copy of that page, filled or not."""
        return self._copies.get(digest)

    def touch(self, digest: bytes) -> None:
        """The copy was of use now."""
        self._copies.move_to_end(digest)

    def add(self, digest: bytes) -> PageCopy | None:
        """A slot for that page, of which there is no copy yet; None: all slots are in use.

        Another copy goes, if need be."""
        if not self._free and not self._drop_oldest():
            return None
        copy = self._copies[digest] = PageCopy(self._free.pop())
        return copy

    def drop(self, digest: bytes) -> None:
        """The copy is of no use; its slot is free once it is not pinned."""
        copy = self._copies.pop(digest)
        self._on_drop(digest)
        copy.is_forgotten = True
        if not copy.num_pins:
            self._free.append(copy.slot)

    def pin(self, copy: PageCopy) -> None:
        """Keep the slot for this page until `unpin`."""
        copy.num_pins += 1
        self._num_pinned += copy.num_pins == 1

    def unpin(self, copy: PageCopy) -> None:
        copy.num_pins -= 1
        self._num_pinned -= copy.num_pins == 0
        if copy.is_forgotten and not copy.num_pins:
            self._free.append(copy.slot)

    def clear(self) -> None:
        """Forget all copies. Slots that are pinned are free when they are unpinned."""
        for digest, copy in self._copies.items():
            self._on_drop(digest)
            copy.is_forgotten = True
            if not copy.num_pins:
                self._free.append(copy.slot)
        self._copies.clear()

    def check(self) -> None:
        """Every slot is free or has one copy, unless it is pinned and forgotten. For tests."""
        owned = sorted([*self._free, *(copy.slot for copy in self._copies.values())])
        assert len(owned) == len(set(owned)), "a slot has two owners"
        pinned = sum(copy.num_pins > 0 for copy in self._copies.values())
        num_forgotten = self._num_pinned - pinned
        assert len(owned) + num_forgotten == self.num_slots, "a slot has no owner"

    def _drop_oldest(self) -> bool:
        for digest, copy in self._copies.items():
            if not copy.num_pins:
                self.drop(digest)
                return True
        return False
