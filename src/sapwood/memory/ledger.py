"""The only owner of the facts about pages: which are free, cached, or leased to a request.

    free ──reserve──> leased ──commit──> cached and locked ──release──> cached
      ^                 │                                                 │
      └────release──────┘<───────────────────evict────────────────────────┘

A page is in exactly one of three places: the allocator's free list, the tree, or the private part
of one lease. A lease's first `num_shared` pages belong to the tree, which keeps them locked for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.memory.pages import PageAllocator
from sapwood.memory.prefix_tree import TOKEN_BYTES, Node, PrefixTree


@dataclass(slots=True, eq=False)
class Lease:
    """The pages of one running request; only the ledger changes it.

    pages          page table: entry i holds tokens i * page_size .. of the request
    num_shared     number of pages, from the first on, that belong to the prefix tree
    first_changed  the lowest index whose page changed since `take_changes`
    """

    namespace: str
    pages: list[int]
    num_shared: int
    node: Node | None
    first_changed: int = 0

    def take_changes(self) -> tuple[int, list[int]]:
        """(index, pages from that index on): the part that has changed since the last call."""
        first = self.first_changed
        self.first_changed = len(self.pages)
        return first, self.pages[first:]


class Ledger:
    """Leases pages to requests. Only a ledger takes, shares and frees pages."""

    def __init__(self, *, num_pages: int, page_size: int, tree: PrefixTree | None) -> None:
        """A ledger of free pages.

        tree  keeps prefixes; None: none is kept, and every page is private to its lease
        """
        self.page_size = page_size
        self._allocator = PageAllocator(num_pages)
        self._tree = tree
        self._leases: set[Lease] = set()

    @property
    def keeps_prefixes(self) -> bool:
        return self._tree is not None

    @property
    def num_pages(self) -> int:
        return self._allocator.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._allocator.num_free

    @property
    def num_cached_pages(self) -> int:
        return self._tree.num_pages if self._tree else 0

    @property
    def num_available_pages(self) -> int:
        """Number of free pages and of pages in prefixes that no lease uses."""
        evictable = self._tree.num_evictable_pages if self._tree else 0
        return self._allocator.num_free + evictable

    @property
    def num_leased_pages(self) -> int:
        return self.num_pages - self.num_available_pages

    @property
    def version(self) -> int:
        """Grows whenever a prefix hit may have changed."""
        return self._tree.version if self._tree else 0

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def prefix_path(self, namespace: str, key: bytes) -> list[tuple[int, int]]:
        """(identity of a node, tokens of it that match) along the longest known prefix.

        For policies; nothing changes. The last whole page is left out if it holds the last token,
        since at least one token must be computed to have logits.
        """
        if self._tree is None:
            return []
        path = self._tree.path(namespace, self._matchable(key))
        return [(id(node), num_pages * self.page_size) for node, num_pages in path]

    def lease(self, namespace: str, key: bytes) -> tuple[Lease, int]:
        """A lease that starts with the longest known prefix of `key`, and that prefix's tokens."""
        if self._tree is None:
            lease = Lease(namespace, [], 0, None)
        else:
            found = self._tree.match(namespace, self._matchable(key))
            self._tree.lock(found.node, is_hit=True)
            lease = Lease(namespace, found.pages, len(found.pages), found.node)
        self._leases.add(lease)
        return lease, lease.num_shared * self.page_size

    def reserve(self, lease: Lease, num_tokens: int) -> bool:
        """Make room for the request's first `num_tokens` tokens.

        Returns False, and changes nothing, if there are not enough pages.
        """
        missing = self.pages_for(num_tokens) - len(lease.pages)
        if missing <= 0:
            return True
        if missing > self.num_available_pages:
            return False
        short = missing - self._allocator.num_free
        if short > 0:
            assert self._tree is not None, "without a tree only free pages are available"
            self._allocator.give_back(self._tree.evict(short))
        lease.pages += self._allocator.take(missing)
        return True

    def commit(self, lease: Lease, key: bytes) -> None:
        """Share the whole pages of `key`, whose KV must be computed.

        A last page that is not full stays private. If the tree has a page with the same tokens
        already, the lease takes the tree's page and its own copy is freed.
        """
        if self._tree is None:
            return
        num_whole = len(key) // (self.page_size * TOKEN_BYTES)
        if num_whole <= lease.num_shared:
            return
        own = lease.pages[:num_whole]
        node, shared = self._tree.insert(
            lease.namespace, key[: num_whole * self.page_size * TOKEN_BYTES], own
        )
        self._tree.lock(node, is_hit=False)
        assert lease.node is not None, "a lease of a ledger with a tree has a node"
        self._tree.unlock(lease.node)
        lease.node = node
        for index in range(lease.num_shared, num_whole):
            if own[index] != shared[index]:
                self._allocator.give_back([own[index]])
                lease.pages[index] = shared[index]
                lease.first_changed = min(lease.first_changed, index)
        lease.num_shared = num_whole

    def release(self, lease: Lease) -> None:
        """End the lease: private pages are free, shared ones stay as a cached prefix."""
        self._leases.remove(lease)
        self._allocator.give_back(lease.pages[lease.num_shared :])
        if self._tree is not None and lease.node is not None:
            self._tree.unlock(lease.node)
        lease.pages = []

    def flush(self) -> int:
        """Forget every prefix that no lease uses. Returns the number of freed pages."""
        if self._tree is None:
            return 0
        pages = self._tree.evict(self._tree.num_pages)
        self._allocator.give_back(pages)
        return len(pages)

    def check(self) -> None:
        """Every page has exactly one owner, and the counters are true. For tests; slow."""
        private = [page for lease in self._leases for page in lease.pages[lease.num_shared :]]
        cached = [page for node in self._tree.nodes() for page in node.pages] if self._tree else []
        owned = sorted([*private, *cached, *self._allocator._free])
        assert owned == list(range(self.num_pages)), "a page has no owner, or two"
        if self._tree is None:
            return
        nodes = list(self._tree.nodes())
        evictable = sum(len(node.pages) for node in nodes if node.num_locks == 0)
        assert evictable == self._tree.num_evictable_pages, "evictable pages are miscounted"
        assert len(cached) == self._tree.num_pages, "cached pages are miscounted"
        for lease in self._leases:
            assert self._path_pages(lease.node) == lease.pages[: lease.num_shared]

    def _path_pages(self, node: Node | None) -> list[int]:
        pages: list[int] = []
        while node is not None:
            pages = node.pages + pages
            node = node.parent
        return pages

    def _matchable(self, key: bytes) -> bytes:
        page_bytes = self.page_size * TOKEN_BYTES
        num_whole = (len(key) - TOKEN_BYTES) // page_bytes
        return key[: num_whole * page_bytes]
