"""The radix tree of computed prefixes: token ids to the pages that hold their KV.

One tree per namespace (`extra_key`). An edge carries whole pages only: its key is the bytes of its
tokens (4 per token, little-endian) and its length is a multiple of the page size. A node that some
request uses is locked, and so is every node above it; the rest can be evicted, leaves first.

Source: Zheng et al. 2023, arXiv:2312.07104.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sapwood.memory.eviction import EvictionKey

TOKEN_BYTES = 4


def token_key(token_ids: Iterable[int]) -> bytes:
    """The bytes that stand for these tokens in the tree's keys."""
    return array("I", token_ids).tobytes()


class Node:
    """A run of whole pages below `parent`; only the tree changes it."""

    __slots__ = (
        "children",
        "is_noted",
        "key",
        "last_used",
        "namespace",
        "num_hits",
        "num_locks",
        "pages",
        "parent",
    )

    def __init__(self, parent: Node | None, key: bytes, pages: list[int]) -> None:
        self.parent = parent
        self.namespace: str | None = None  # a root's; None below
        self.key = key
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.num_locks = 0
        self.num_hits = 0
        self.last_used = 0
        self.is_noted = False  # whether the tree's notes of what can be evicted name it


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix.

    node   where it ends; stays valid while it is locked
    pages  its pages, in the order of the tokens
    """

    node: Node
    pages: list[int]


class PrefixTree:
    """Prefixes of all namespaces. It knows pages by number and owns those that it holds.

    eviction_key  of (num_hits, last_used); a use never makes it smaller
    """

    def __init__(self, page_size: int, eviction_key: Callable[[int, int], EvictionKey]) -> None:
        self._page_bytes = page_size * TOKEN_BYTES
        self._eviction_key = eviction_key
        self._roots: dict[str, Node] = {}
        self._num_uses = 0
        self._num_notes = 0
        # At most one note per node. A note grows stale when its node is used or locked; whoever
        # takes it from the heap then writes a new one, or none.
        self._candidates: list[tuple[EvictionKey, int, Node]] = []
        self.num_pages = 0
        self.num_evictable_pages = 0

    def path(self, namespace: str, key: bytes) -> list[tuple[Node, int]]:
        """The nodes along the longest known prefix, each with how many of its pages match.

        Changes nothing, so it serves for planning.
        """
        steps: list[tuple[Node, int]] = []
        node = self._roots.get(namespace)
        offset = 0
        while node is not None:
            child = node.children.get(key[offset : offset + self._page_bytes])
            if child is None:
                break
            num_pages = self._common_pages(child.key, key, offset)
            steps.append((child, num_pages))
            if num_pages < len(child.pages):
                break
            offset += len(child.key)
            node = child
        return steps

    def match(self, namespace: str, key: bytes) -> Match:
        """The longest known prefix of `key`; a node that matches in part is split there."""
        steps = self.path(namespace, key)
        if not steps:
            return Match(self._root(namespace), [])
        last, num_pages = steps[-1]
        if num_pages < len(last.pages):
            last = self._split(last, num_pages)
        nodes = [node for node, _ in steps[:-1]] + [last]
        return Match(last, [page for node in nodes for page in node.pages])

    def insert(self, namespace: str, key: bytes, pages: Sequence[int]) -> tuple[Node, list[int]]:
        """Remember that `pages` hold the KV of `key` (whole pages of tokens).

        Returns the node where the key ends and the tree's own pages for it. Where these differ from
        `pages`, the tree knew that part before and did not take the page given for it.
        """
        assert len(key) == len(pages) * self._page_bytes, "a key must be whole pages"
        found = self.match(namespace, key)
        known = len(found.pages)
        if known == len(pages):
            return found.node, found.pages
        fresh = list(pages[known:])
        node = Node(found.node, key[known * self._page_bytes :], fresh)
        self._num_uses += 1
        node.last_used = self._num_uses
        found.node.children[node.key[: self._page_bytes]] = node
        self.num_pages += len(fresh)
        self.num_evictable_pages += len(fresh)
        self._offer(node)
        return node, found.pages + fresh

    def lock(self, node: Node) -> None:
        """Keep this prefix until `unlock`."""
        walker: Node | None = node
        while walker is not None:
            if walker.num_locks == 0:
                self.num_evictable_pages -= len(walker.pages)
            walker.num_locks += 1
            walker = walker.parent

    def count_hit(self, node: Node) -> None:
        """For the eviction policy: a request goes on from this prefix."""
        self._num_uses += 1
        walker: Node | None = node
        while walker is not None:
            walker.num_hits += 1
            walker.last_used = self._num_uses
            walker = walker.parent

    def unlock(self, node: Node) -> None:
        walker: Node | None = node
        while walker is not None:
            assert walker.num_locks > 0, "a prefix was unlocked more often than locked"
            walker.num_locks -= 1
            if walker.num_locks == 0:
                self.num_evictable_pages += len(walker.pages)
                self._offer(walker)
            walker = walker.parent
        self._drop_empty_roots(node)

    def evict(self, num_pages: int) -> list[int]:
        """Forget that many pages of unused prefixes, or all there are if they are fewer."""
        evicted: list[int] = []
        while len(evicted) < num_pages and self._candidates:
            key, _, node = heapq.heappop(self._candidates)
            node.is_noted = False
            if key != self._key_of(node):
                self._offer(node)
            elif self._is_candidate(node):
                evicted += self._shorten(node, num_pages - len(evicted))
        self.num_pages -= len(evicted)
        self.num_evictable_pages -= len(evicted)
        return evicted

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_notes(self) -> None:
        """What can be evicted is noted, and nothing twice. For tests; slow."""
        nodes = list(self.nodes())
        noted = sum(node.is_noted for node in nodes)
        assert noted == len(self._candidates), "notes of what can be evicted pile up"
        assert all(node.is_noted for node in nodes if self._is_candidate(node)), "a page is lost"

    def _root(self, namespace: str) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(None, b"", [])
            root.namespace = namespace
        return root

    def _drop_empty_roots(self, node: Node) -> None:
        """Namespaces come from requests: one that holds nothing must not stay in memory."""
        if node.namespace is not None and not node.children and node.num_locks == 0:
            self._roots.pop(node.namespace, None)

    def _common_pages(self, edge: bytes, key: bytes, offset: int) -> int:
        size = self._page_bytes
        if key.startswith(edge, offset):
            return len(edge) // size
        num_pages = 0
        limit = min(len(edge), len(key) - offset) // size
        while num_pages < limit:
            start = num_pages * size
            if edge[start : start + size] != key[offset + start : offset + start + size]:
                break
            num_pages += 1
        return num_pages

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut the node after `num_pages`; the new upper part is returned, locks and uses kept."""
        at = num_pages * self._page_bytes
        assert node.parent is not None, "a root holds no pages"
        upper = Node(node.parent, node.key[:at], node.pages[:num_pages])
        upper.num_locks = node.num_locks
        upper.num_hits = node.num_hits
        upper.last_used = node.last_used
        node.parent.children[upper.key[: self._page_bytes]] = upper
        node.parent = upper
        node.key = node.key[at:]
        node.pages = node.pages[num_pages:]
        upper.children[node.key[: self._page_bytes]] = node
        return upper

    def _shorten(self, leaf: Node, num_pages: int) -> list[int]:
        """Take up to `num_pages` off the leaf's end; the whole leaf goes if none are left."""
        parent = leaf.parent
        assert parent is not None, "a root is never a candidate"
        if num_pages < len(leaf.pages):
            kept = len(leaf.pages) - num_pages
            taken = leaf.pages[kept:]
            del leaf.pages[kept:]
            leaf.key = leaf.key[: kept * self._page_bytes]
            self._offer(leaf)
            return taken
        del parent.children[leaf.key[: self._page_bytes]]
        leaf.parent = None
        self._offer(parent)
        self._drop_empty_roots(parent)
        return leaf.pages

    def _is_candidate(self, node: Node) -> bool:
        return node.parent is not None and node.num_locks == 0 and not node.children

    def _key_of(self, node: Node) -> EvictionKey:
        return self._eviction_key(node.num_hits, node.last_used)

    def _offer(self, node: Node) -> None:
        """Note the node as evictable if it is."""
        if node.is_noted or not self._is_candidate(node):
            return
        node.is_noted = True
        self._num_notes += 1
        heapq.heappush(self._candidates, (self._key_of(node), self._num_notes, node))
