"""The only owner of the facts about pages and slots: which are free, cached, or leased.

    free ──reserve──> leased ──commit──> cached and locked ──release──> cached
      ^                 │                                                 │
      └────release──────┘<───────────────────evict────────────────────────┘

A page is in exactly one of three places: the allocator's free list, the tree, or the private part
of one lease. The first `num_shared` pages of a lease's tokens belong to the tree, which keeps them
locked for it. The same holds in every pool, with two additions. A page of a window pool is given
back as soon as no later token looks at it: a private one becomes free, one of the tree's is no
longer locked. A state that others may start from is never written again: its request goes on
with a copy in another slot, just as a request does that hits a state. And what somebody reads
outside the order of the steps, to send it elsewhere, stays as it is until the reader is done, even
if the request ends before.
"""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.memory.lease import NO_PAGE, Lease, StateLease, WindowLease
from sapwood.memory.namespace import Namespace
from sapwood.memory.needs import Needs
from sapwood.memory.node import TOKEN_BYTES, Node
from sapwood.memory.pages import PageAllocator
from sapwood.memory.prefix_tree import PrefixTree, first_needed_page
from sapwood.memory.window_leases import WindowLeases
from sapwood.memory.without_leases import WithoutLeases
from sapwood.schema.cache import FULL_POOL, CachePool

MOST_KEPT_STATES = 3
"""States of one request's prefixes that are not in the tree yet; the oldest goes first."""


class Ledger:
    """Leases pages and slots to requests. Only a ledger takes, shares and frees them."""

    def __init__(
        self,
        *,
        num_pages: int | Sequence[int],
        page_size: int,
        tree: PrefixTree | None,
        pools: Sequence[CachePool] = (FULL_POOL,),
        state_interval: int = 256,
    ) -> None:
        """A ledger of free pages and slots.

        num_pages       of the one pool, or of each of the pools; slots if it is a pool of states
        tree            keeps prefixes, in the same pools; None: none is kept, and all is private
        state_interval  tokens between the states that are kept for prefixes; a multiple of the page
        """
        sizes = [num_pages] if isinstance(num_pages, int) else list(num_pages)
        assert len(sizes) == len(pools), "every pool has a size"
        assert state_interval % page_size == 0, "a state is kept at the end of a page"
        self.page_size = page_size
        self._tree = tree
        self._leases: set[Lease] = set()
        self._allocators = [PageAllocator(size) for size in sizes]
        self.needs = Needs(pools, page_size, state_interval)
        self._full, self._state = self.needs.full, self.needs.state
        self._windows, self._is_plain = self.needs.windows, self.needs.is_plain
        self._pages = self._allocators[0]
        self._kept_slots: frozenset[int] = frozenset()
        """That must not be taken from the tree now."""
        self._held = WindowLeases(tree, self._windows, self._allocators)

    # ---- figures -----------------------------------------------------------------------------

    @property
    def keeps_prefixes(self) -> bool:
        return self._tree is not None

    @property
    def keeps_states(self) -> bool:
        return self._state is not None

    @property
    def pool_sizes(self) -> list[int]:
        """Pages, or slots, of each pool."""
        return [allocator.num_pages for allocator in self._allocators]

    @property
    def num_pages(self) -> int:
        """Of the first pool: the one that keeps every token, or else the shortest window's."""
        return self._pages.num_pages

    @property
    def num_free_pages(self) -> int:
        """Of the first pool."""
        return self._pages.num_free

    @property
    def num_cached_pages(self) -> int:
        """Pages of the first pool in the tree."""
        tree = self._tree
        if tree is None:
            return 0
        if self._full is not None:
            return tree.num_pages
        return tree.num_window_pages[0] if self._windows else tree.num_states

    @property
    def num_available_pages(self) -> int:
        """Of the first pool: free pages, and pages in prefixes that no lease uses."""
        return self._pages.num_free + self._num_evictable(0)

    @property
    def num_leased_pages(self) -> int:
        return self.num_pages - self.num_available_pages

    def free_and_leased(self) -> list[tuple[int, int]]:
        """Per pool: (free pages or slots, those that leases hold, in the tree or not)."""
        return [
            (allocator.num_free, allocator.num_pages - available)
            for allocator, available in zip(self._allocators, self.available(), strict=True)
        ]

    def available(self) -> list[int]:
        """Per pool: free pages or slots, and those that the tree can give away."""
        return [
            allocator.num_free + self._num_evictable(pool)
            for pool, allocator in enumerate(self._allocators)
        ]

    def without_leases(self) -> WithoutLeases:
        """Asks what would be available if some leases were released; none is so far."""
        return WithoutLeases(
            self.available(), self._full, [pool for pool, _ in self._windows], self._state
        )

    # ---- leases ------------------------------------------------------------------------------

    def prefix_path(self, namespace: Namespace, key: bytes) -> list[tuple[int, int]]:
        """(identity of a node, tokens of it that match) along the longest known prefix.

        For policies; nothing changes. The last whole page is left out if it holds the last token,
        since at least one token must be computed to have logits.
        """
        if self._tree is None:
            return []
        path = self._tree.path(namespace, self._matchable(key))
        return [(id(node), num_pages * self.page_size) for node, num_pages in path]

    def lease(self, namespace: Namespace, key: bytes) -> tuple[Lease, int]:
        """A lease that starts with the longest known prefix of `key`, and that prefix's tokens.

        A lease may be only tried, and given back at once; `count_hit` tells of those that are used.
        """
        if self._tree is None:
            lease = Lease(namespace, [], 0, None)
        else:
            found = self._tree.match(namespace, self._matchable(key))
            self._tree.lock(found.node)
            lease = Lease(namespace, found.pages, found.length, found.node)
        if not self._is_plain:
            self._begin_others(lease, found.windows if self._tree is not None else [])
        self._leases.add(lease)
        return lease, lease.num_shared * self.page_size

    def count_hit(self, lease: Lease) -> None:
        """For the eviction policy: a request goes on from the lease's prefix."""
        if self._tree is not None and lease.node is not None:
            self._tree.count_hit(lease.node)

    def reserve(
        self, lease: Lease, num_tokens: int, start: int = 0, end: int | None = None
    ) -> bool:
        """Make room for the request's first `num_tokens` tokens, of which the next step computes
        start .. end - 1; end None: all. Windows hold what these look at, and give the rest back.

        Returns False if a pool has not enough; then nothing was taken.
        """
        if self._is_plain:
            missing = -(-num_tokens // self.page_size) - len(lease.pages)
            if missing <= 0:
                return True
            if missing > self.num_available_pages:
                return False
            lease.pages += self._take(0, missing)
            return True
        end = num_tokens if end is None else end
        for index, (_, window) in enumerate(self._windows):
            self._held.give_back(lease, index, first_needed_page(window, start, self.page_size))
        needed = self.needs.missing(lease, num_tokens, start, end)
        if self._lacks(needed):
            self._held.unlock_exactly(lease)
            if self._lacks(needed):
                return False
        if self._full is not None:
            lease.pages += self._take(self._full, needed[self._full])
        for (pool, _), held in zip(self._windows, lease.windows, strict=True):
            # A window may have left all pages behind that the request ever had.
            held.pages += [NO_PAGE] * (held.first - len(held.pages))
            held.pages += self._take(pool, needed[pool])
        if lease.state is not None:
            self._ready_state(lease.state)
        return True

    def commit(self, lease: Lease, key: bytes) -> None:
        """Share the whole pages of `key`, which must be computed, and states that were kept there.

        A last page that is not full stays private. If the tree has a page with the same tokens
        already, the lease takes the tree's page and its own copy is freed.
        """
        tree = self._tree
        if tree is None:
            return
        num_whole = len(key) // (self.page_size * TOKEN_BYTES)
        if num_whole <= lease.num_shared:
            return
        own = lease.pages[:num_whole]
        windows = [(held.first, held.pages[held.first : num_whole]) for held in lease.windows]
        node, shared = tree.insert(
            lease.namespace, key[: num_whole * self.page_size * TOKEN_BYTES], own, windows
        )
        tree.lock(node)
        assert lease.node is not None, "a lease of a ledger with a tree has a node"
        old_node, old_shared = lease.node, lease.num_shared
        lease.node, lease.num_shared = node, num_whole
        if self._full is not None:
            for index in range(old_shared, num_whole):
                if own[index] != shared[index]:
                    lease.give_up(self._allocators[self._full], self._full, own[index])
                    lease.pages[index] = shared[index]
                    lease.first_changed = min(lease.first_changed, index)
        if not self._is_plain:
            for index in range(len(self._windows)):
                self._held.share(lease, index, old_shared)
            if lease.state is not None:
                self._share_states(lease, lease.state, node, num_whole)
        tree.unlock(old_node)

    def known_pages(self, namespace: Namespace, key: bytes) -> int:
        """How many pages of tokens from the first on the tree has in the pool that keeps every
        token; windows and states may be missing there."""
        return (
            0 if self._tree is None or self._full is None else self._tree.known(namespace, key)[1]
        )

    def matchable(self, key: bytes) -> bytes:
        """The part of a key that a prefix hit may cover: whole pages, without the last token."""
        return self._matchable(key)

    def restore(self, lease: Lease, key: bytes) -> list[tuple[int, int, int]] | None:
        """Lengthen the prefix of a lease that has just begun by pages that another tier brings.

        key      whole pages of tokens, more than the lease shares
        Returns  (pool, index of the page of tokens, page or slot) of each part that the tree did
                 not have: before the next step somebody fills these. The tree shares them at once.
                 None: a pool has not enough; then nothing was taken.
        """
        tree, begin = self._tree, lease.num_shared
        assert tree is not None, "without a tree no prefix is kept"
        num_whole = len(key) // (self.page_size * TOKEN_BYTES)
        num_tokens = num_whole * self.page_size
        # What the tree knows of these must not make room for the rest.
        known, _ = tree.known(lease.namespace, key)
        tree.lock(known)
        missing = self.needs.missing(lease, num_tokens, num_tokens, num_tokens)
        # A plan fills slots before it copies states, so the copy would be of the other state.
        self._kept_slots = self._copied_slots()
        if self._lacks(missing) or self._lacks_a_slot():
            self._kept_slots = frozenset()
            tree.unlock(known)
            return None
        has_room = self.reserve(lease, num_tokens, num_tokens, num_tokens)
        self._kept_slots = frozenset()
        assert has_room, "the room was counted"
        own = [] if self._full is None else lease.pages[begin:num_whole]
        firsts = [max(held.first, begin) for held in lease.windows]
        of_windows = [
            held.pages[first:num_whole] for held, first in zip(lease.windows, firsts, strict=True)
        ]
        state, slot = lease.state, None
        if state is not None:
            slot = state.planned_slot
            state.copies.clear()
            state.kept.append((num_whole, slot))
            state.source, state.slot = slot, None
        self.commit(lease, key)
        tree.unlock(known)
        empty = [
            (self._full or 0, index, page)
            for index, page in enumerate(own, start=begin)
            if lease.pages[index] == page
        ]
        for (pool, _), held, first, pages in zip(
            self._windows, lease.windows, firsts, of_windows, strict=True
        ):
            empty += [
                (pool, index, page)
                for index, page in enumerate(pages, start=first)
                if held.pages[index] == page
            ]
        if state is not None and state.source == slot and slot is not None:
            assert self._state is not None
            empty.append((self._state, num_whole - 1, slot))
        return empty

    def _copied_slots(self) -> frozenset[int]:
        """The slots that the next plan copies states from."""
        return frozenset(
            source
            for lease in self._leases
            if lease.state is not None
            for source, _ in lease.state.copies
        )

    def _lacks_a_slot(self) -> bool:
        """Whether all slots may be needed that could be had."""
        if self._state is None or self._allocators[self._state].num_free > 0:
            return False
        assert self._tree is not None
        return self._tree.num_evictable_states <= len(self._kept_slots)

    def keep_state(self, lease: Lease, num_tokens: int, num_prompt: int) -> None:
        """After a step was planned that ends at `num_tokens`: keep the state there, if this is a
        place for one. The request's next step then starts from a copy."""
        state = lease.state
        if state is None or self._tree is None or num_tokens % self.page_size:
            return
        is_end = num_tokens == (num_prompt - 1) // self.page_size * self.page_size
        if num_tokens % self.needs.state_interval and not is_end:
            return
        assert state.slot is not None, "a step has a state"
        state.kept.append((num_tokens // self.page_size, state.slot))
        state.source, state.slot = state.slot, None
        if len(state.kept) > MOST_KEPT_STATES:
            assert self._state is not None
            lease.give_up(self._allocators[self._state], self._state, state.kept.pop(0)[1])

    def begin_trial(self, lease: Lease) -> bool:
        """Keep the state as it is before the next step, which `reserve` has made room for and which
        may have to be taken back. Returns False, and changes nothing, if no slot is left for that.

        Always True where the model keeps no states: tokens that are wrong are written over."""
        state = lease.state
        if state is None:
            return True
        assert self._state is not None
        assert state.slot is not None
        assert state.before_trial is None, "one trial at a time"
        if self._allocators[self._state].num_free + self._num_evictable(self._state) < 1:
            return False
        (slot,) = self._take(self._state, 1)
        # All copies of a plan happen at once: what is copied to the slot itself is copied twice.
        source = state.copies[-1][0] if state.copies else state.slot
        state.copies.append((source, slot))
        state.before_trial, state.slot = state.slot, slot
        return True

    def end_trial(self, lease: Lease, *, succeeded: bool) -> None:
        """Go on from the state after the step that was on trial, or else from the one before it."""
        state = lease.state
        if state is None or state.before_trial is None:
            return
        assert self._state is not None
        assert state.slot is not None, "a request waits for its trial"
        if not succeeded:
            state.slot, state.before_trial = state.before_trial, state.slot
        lease.give_up(self._allocators[self._state], self._state, state.before_trial)
        state.before_trial = None

    def release(self, lease: Lease) -> None:
        """End the lease: what is private is free, what is shared stays as a cached prefix. Readers
        of the lease keep all of it until the last of them is done."""
        if lease.num_readers:
            lease.is_released = True
            return
        self._leases.remove(lease)
        if self._full is not None:
            self._allocators[self._full].give_back(lease.pages[lease.num_shared :])
        for index in range(len(lease.windows)):
            self._held.give_back(lease, index, len(lease.windows[index].pages))
            self._held.unlock(lease, index, lease.num_shared)
        if lease.state is not None:
            self._unpin(lease.state)
            assert self._state is not None
            self._allocators[self._state].give_back(lease.state.slots)
            lease.state = None
        if self._tree is not None and lease.node is not None:
            self._tree.unlock(lease.node)
        lease.pages = []
        lease.windows = ()

    def begin_read(self, lease: Lease) -> None:
        """Somebody reads what the lease holds now, besides the state that steps go on writing.

        None of that is written or given to others before `end_read`, whatever becomes of the
        request; its new tokens go on being written behind."""
        assert lease.num_readers or not lease.is_released, "its request has ended"
        lease.num_readers += 1

    def end_read(self, lease: Lease) -> None:
        """One reader is done."""
        lease.num_readers -= 1
        if lease.num_readers:
            return
        for pool, number in lease.withheld:
            self._allocators[pool].give_back([number])
        lease.withheld.clear()
        if lease.is_released:
            self.release(lease)

    def flush(self) -> int:
        """Forget every prefix that no lease uses. Returns the number of freed pages."""
        if self._tree is None:
            return 0
        num_free = self.num_free_pages
        pages = self._tree.forget()
        if self._full is not None:
            self._allocators[self._full].give_back(pages)
        self._take_freed()
        return self.num_free_pages - num_free

    # ---- pools -------------------------------------------------------------------------------

    def _num_evictable(self, pool: int) -> int:
        tree = self._tree
        if tree is None:
            return 0
        if pool == self._full:
            return tree.num_evictable_pages
        if pool == self._state:
            return tree.num_evictable_states
        index = pool - (0 if self._full is None else 1)
        return tree.num_evictable_window_pages[index]

    def _lacks(self, needed: Sequence[int]) -> bool:
        return any(
            number > allocator.num_free and number > allocator.num_free + self._num_evictable(pool)
            for pool, (number, allocator) in enumerate(zip(needed, self._allocators, strict=True))
        )

    def _take(self, pool: int, number: int) -> list[int]:
        """Take pages or slots; the tree gives some away if too few are free."""
        allocator = self._allocators[pool]
        short = number - allocator.num_free
        if short > 0:
            tree = self._tree
            assert tree is not None, "without a tree only free pages are available"
            if pool == self._full:
                allocator.give_back(tree.evict(short))
            elif pool == self._state:
                for _ in range(short):
                    tree.evict_state(self._kept_slots)
            else:
                tree.evict_window(pool - (0 if self._full is None else 1), short)
            if not self._is_plain:
                self._take_freed()
        return allocator.take(number)

    def _take_freed(self) -> None:
        assert self._tree is not None
        for allocator, freed in zip(self._allocators, self._tree.freed, strict=True):
            if freed:
                allocator.give_back(freed)
                freed.clear()

    def _begin_others(self, lease: Lease, windows: Sequence[list[int]]) -> None:
        """The parts of a new lease in window pools and in the pool of states."""
        node, length = lease.node, lease.num_shared
        if self._windows and node is None:
            lease.windows = tuple(WindowLease([]) for _ in self._windows)
        elif self._windows:
            assert self._tree is not None
            held = []
            for pages in windows:
                first = length - len(pages)
                held.append(WindowLease([NO_PAGE] * first + pages, first, first))
            lease.windows = tuple(held)
            for index in range(len(held)):
                self._held.lock(lease, index, held[index].first)
        if self._state is not None:
            lease.state = StateLease()
            if node is not None and node.state is not None:
                self._start_from(lease.state, node)

    # ---- states ------------------------------------------------------------------------------

    def _start_from(self, state: StateLease, node: Node) -> None:
        assert self._tree is not None
        self._tree.pin_state(node)
        state.source, state.source_node = node.state, node

    def _unpin(self, state: StateLease) -> None:
        if state.source_node is not None:
            assert self._tree is not None
            self._tree.unpin_state(state.source_node)
            state.source_node = None

    def _ready_state(self, state: StateLease) -> None:
        """Give the lease a slot that the next step can write, with the state in it.

        A source that nobody else needs is used itself if there is no other slot."""
        if state.slot is not None:
            return
        assert self._state is not None
        if self._allocators[self._state].num_free + self._num_evictable(self._state) > 0:
            (state.slot,) = self._take(self._state, 1)
            if state.source is not None:
                state.copies = [(state.source, state.slot)]
            self._unpin(state)
        elif state.source_node is not None:
            assert self._tree is not None
            state.slot = self._tree.take_over_state(state.source_node)
            state.source_node = None
        else:
            state.slot = state.kept.pop()[1]
            assert state.slot == state.source, "the newest state is the source"
        state.source = None

    def _share_states(self, lease: Lease, state: StateLease, node: Node, num_whole: int) -> None:
        """Give the states of the first `num_whole` pages to the tree."""
        assert self._tree is not None
        assert self._state is not None
        while state.kept and state.kept[0][0] <= num_whole:
            end, slot = state.kept.pop(0)
            owner = self._tree.put_state(node, num_whole, end, slot)
            if owner is None:
                owner = self._tree.node_at(node, num_whole, end)
                lease.give_up(self._allocators[self._state], self._state, slot)
            if state.source == slot:
                self._start_from(state, owner)

    # ---- for tests ---------------------------------------------------------------------------

    def check(self) -> None:
        """Every page and slot has exactly one owner, and the counters are true. Slow."""
        nodes = list(self._tree.nodes()) if self._tree else []
        for pool, allocator in enumerate(self._allocators):
            owned = sorted([*self._private(pool), *self._cached(pool, nodes), *allocator._free])
            assert owned == list(range(allocator.num_pages)), f"pool {pool}: no owner, or two"
        if self._tree is None:
            return
        assert not any(self._tree.freed), "freed pages are not taken back"
        self._tree.check()
        for lease in self._leases:
            self._check_shared(lease)

    def _private(self, pool: int) -> list[int]:
        withheld = [number for lease in self._leases for of, number in lease.withheld if of == pool]
        return [*withheld, *self._used_privately(pool)]

    def _used_privately(self, pool: int) -> list[int]:
        if pool == self._full:
            return [page for lease in self._leases for page in lease.pages[lease.num_shared :]]
        if pool == self._state:
            return [slot for lease in self._leases if lease.state for slot in lease.state.slots]
        index = pool - (0 if self._full is None else 1)
        return [
            page
            for lease in self._leases
            for held in [lease.windows[index]]
            for page in held.pages[max(held.first, lease.num_shared) :]
        ]

    def _cached(self, pool: int, nodes: Sequence[Node]) -> list[int]:
        if pool == self._full:
            return [page for node in nodes for page in node.pages]
        if pool == self._state:
            return [node.state for node in nodes if node.state is not None]
        index = pool - (0 if self._full is None else 1)
        return [page for node in nodes for page in node.windows[index].pages]

    def _check_shared(self, lease: Lease) -> None:
        """The shared part of a lease is what the tree has, and is locked."""
        path: list[Node] = []
        node = lease.node
        while node is not None and node.parent is not None:
            path.insert(0, node)
            node = node.parent
        assert sum(node.length for node in path) == lease.num_shared
        if self._full is not None:
            assert [page for node in path for page in node.pages] == lease.pages[: lease.num_shared]
        for index, held in enumerate(lease.windows):
            begin = min(held.first, lease.num_shared)
            assert lease.node is not None
            assert self._tree is not None
            shared = self._tree.window_pages(lease.node, lease.num_shared, index, begin)
            assert shared == held.pages[begin : lease.num_shared]
            assert held.locked_from <= begin or begin == lease.num_shared
        state = lease.state
        if state is not None and state.source_node is not None:
            assert state.source_node.state == state.source
            assert state.source_node.num_pins > 0

    def _matchable(self, key: bytes) -> bytes:
        page_bytes = self.page_size * TOKEN_BYTES
        num_whole = (len(key) - TOKEN_BYTES) // page_bytes
        return key[: num_whole * page_bytes]
