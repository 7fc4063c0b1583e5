"""What a ledger would have if some of its leases were released."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import le

from sapwood.memory.lease import Lease
from sapwood.memory.node import Node


class WithoutLeases:
    """It releases none itself, and is true only until the ledger changes.

    available  per pool: pages or slots that would be available
    """

    def __init__(
        self,
        available: list[int],
        full_pool: int | None,
        window_pools: Sequence[int],
        state_pool: int | None,
    ) -> None:
        self.available = available
        self._full = full_pool
        self._windows = window_pools
        self._state = state_pool
        # How many of each node's locks belong to the leases that are left out.
        self._num_locks: Counter[Node] = Counter()
        self._num_window_locks: Counter[tuple[Node, int]] = Counter()
        self._num_pins: Counter[Node] = Counter()

    @property
    def num_available_pages(self) -> int:
        """Of the first pool."""
        return self.available[0]

    def has(self, missing: Sequence[int]) -> bool:
        return all(map(le, missing, self.available))

    def leave_out(self, lease: Lease) -> None:
        self._count(lease, 1)

    def keep(self, lease: Lease) -> None:
        """The opposite of `leave_out`."""
        self._count(lease, -1)

    def _count(self, lease: Lease, sign: int) -> None:
        if lease.num_readers:
            return  # its release would free nothing yet
        if self._full is not None:
            self._count_pages(lease, sign, self._full)
        for index, pool in enumerate(self._windows):
            self._count_window(lease, sign, index, pool)
        if self._state is not None:
            self._count_state(lease, sign, self._state)

    def _count_pages(self, lease: Lease, sign: int, pool: int) -> None:
        self.available[pool] += sign * (len(lease.pages) - lease.num_shared)
        node = lease.node
        while node is not None:
            # A node counts while all of its locks belong to leases that are left out.
            was = self._num_locks[node] == node.num_locks
            self._num_locks[node] += sign
            here = self._num_locks[node] == node.num_locks
            self.available[pool] += (here - was) * len(node.pages)
            node = node.parent

    def _count_window(self, lease: Lease, sign: int, index: int, pool: int) -> None:
        held = lease.windows[index]
        private = len(held.pages) - max(held.first, lease.num_shared)
        self.available[pool] += sign * max(private, 0)
        node, end = lease.node, lease.num_shared
        while node is not None and end > held.locked_from:
            part, lock = node.windows[index], (node, index)
            was = self._num_window_locks[lock] == part.num_locks
            self._num_window_locks[lock] += sign
            here = self._num_window_locks[lock] == part.num_locks
            self.available[pool] += (here - was) * len(part.pages)
            end -= node.length
            node = node.parent

    def _count_state(self, lease: Lease, sign: int, pool: int) -> None:
        state = lease.state
        if state is None:
            return
        self.available[pool] += sign * len(state.slots)
        node = state.source_node
        if node is not None:
            was = self._num_pins[node] == node.num_pins
            self._num_pins[node] += sign
            here = self._num_pins[node] == node.num_pins
            self.available[pool] += here - was
