"""The parts of leases in window pools: the pages they hold, and those of the tree they lock."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.memory.lease import NO_PAGE, Lease
from sapwood.memory.pages import PageAllocator
from sapwood.memory.prefix_tree import PrefixTree


class WindowLeases:
    """Takes no pages; gives back those that no later token looks at. A part of a `Ledger`."""

    def __init__(
        self,
        tree: PrefixTree | None,
        windows: Sequence[tuple[int, int]],
        allocators: Sequence[PageAllocator],
    ) -> None:
        """windows: (pool, tokens) of each window pool; allocators: of all pools"""
        self._tree = tree
        self._windows = windows
        self._allocators = allocators

    def lock(self, lease: Lease, index: int, first: int) -> None:
        """Lock the pages of a window pool from `first` on, up to the lease's node."""
        tree, node, held = self._tree, lease.node, lease.windows[index]
        assert tree is not None
        assert node is not None
        held.locked_from = held.unlock_at = first
        if first >= lease.num_shared:
            return
        tree.node_at(node, lease.num_shared, first)  # so that a node begins there
        end = lease.num_shared
        while end > first:
            tree.lock_window(node, index)
            held.unlock_at = end
            end -= node.length
            assert node.parent is not None
            node = node.parent

    def share(self, lease: Lease, index: int, old_shared: int) -> None:
        """After a commit: hold the tree's pages instead of the lease's own where it has them."""
        tree, held, node = self._tree, lease.windows[index], lease.node
        assert tree is not None
        assert node is not None
        begin = max(held.first, old_shared)
        pool = self._windows[index][0]
        if begin < lease.num_shared:
            shared = tree.window_pages(node, lease.num_shared, index, begin)
            for at, page in enumerate(shared, start=begin):
                if held.pages[at] != page:
                    lease.give_up(self._allocators[pool], pool, held.pages[at])
                    held.pages[at] = page
                    held.first_changed = min(held.first_changed, at)
        # Nodes of the new part are locked one by one; those of the old part are locked already.
        had_some = held.locked_from < old_shared
        end, unlock_at = lease.num_shared, lease.num_shared
        walker = node
        while end > begin:
            tree.lock_window(walker, index)
            unlock_at = end
            end -= walker.length
            assert walker.parent is not None
            walker = walker.parent
        if not had_some:
            held.locked_from, held.unlock_at = min(end, lease.num_shared), unlock_at

    def give_back(self, lease: Lease, index: int, first: int) -> None:
        """Give back the pages of a window pool before index `first`, as far as they are private;
        unlock those nodes of the tree that lie before it."""
        held = lease.windows[index]
        if first <= held.first or lease.num_readers:
            return
        pool = self._windows[index][0]
        private = range(max(held.first, lease.num_shared), min(first, len(held.pages)))
        if private:
            self._allocators[pool].give_back(held.pages[at] for at in private)
        end = min(first, len(held.pages))
        held.pages[held.first : end] = [NO_PAGE] * (end - held.first)
        held.first = first
        if held.locked_from < lease.num_shared and first >= held.unlock_at:
            self.unlock(lease, index, first)

    def unlock(self, lease: Lease, index: int, first: int) -> None:
        """Unlock the nodes that the lease has locked in a window pool, as far as they end before
        `first`."""
        held, node, end = lease.windows[index], lease.node, lease.num_shared
        if held.locked_from >= end or self._tree is None:
            return
        locked_from = end
        unlock_at = end
        while node is not None and end > held.locked_from:
            if end <= first:
                self._tree.unlock_window(node, index)
            else:
                locked_from, unlock_at = end - node.length, end
            end -= node.length
            node = node.parent
        held.locked_from, held.unlock_at = locked_from, unlock_at

    def unlock_exactly(self, lease: Lease) -> None:
        """Split nodes where the lease's windows begin, so that no page before that stays locked."""
        for index, held in enumerate(lease.windows):
            if held.locked_from < held.first < lease.num_shared:
                assert self._tree is not None
                assert lease.node is not None
                self._tree.node_at(lease.node, lease.num_shared, held.first)
                self.unlock(lease, index, held.first)
