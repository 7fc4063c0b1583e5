"""A node of the prefix tree: one part for each pool of the cache."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from sapwood.memory.eviction import EvictionKey

TOKEN_BYTES = 4
"""Of a token's id in a key."""


class WindowPart:
    """A node's pages in a window pool; only the tree changes it.

    pages      of the node's last tokens; those of its first ones may have been given away, since a
               request needs only a window. With none left the node is a tombstone in this pool.
    num_locks  leases that hold these pages
    """

    __slots__ = ("num_locks", "pages")

    def __init__(self, pages: list[int], num_locks: int = 0) -> None:
        self.pages = pages
        self.num_locks = num_locks

    @property
    def num_evictable(self) -> int:
        return 0 if self.num_locks else len(self.pages)


class Node:
    """A run of whole pages of tokens below `parent`; only the tree changes it.

    length    number of pages of tokens
    pages     their pages in the pool that keeps every token; empty if the model has no such pool
    windows   one part per window pool
    place     the node's key among its parent's children: the bytes of its first page, after the
              mark of the branch that begins here, if one does
    state     slot of the state after the node's last token; None: no state is kept there
    num_pins  leases whose next step starts from a copy of that state
    digests   of the node's pages of tokens, see `PageHash`; empty until somebody asks for them
    """

    __slots__ = (
        "children",
        "digests",
        "key",
        "last_used",
        "length",
        "namespace",
        "num_hits",
        "num_locks",
        "num_pins",
        "pages",
        "parent",
        "place",
        "state",
        "windows",
    )

    def __init__(
        self,
        parent: Node | None,
        key: bytes,
        length: int,
        pages: list[int],
        windows: tuple[WindowPart, ...] = (),
    ) -> None:
        self.parent = parent
        self.namespace: str | None = None  # a root's; None below
        self.key = key
        self.place = b""
        self.length = length
        self.pages = pages
        self.windows = windows
        self.state: int | None = None
        self.children: dict[bytes, Node] = {}
        self.num_locks = 0
        self.num_pins = 0
        self.num_hits = 0
        self.last_used = 0
        self.digests: list[bytes] = []


class EvictionQueue:
    """The nodes that may give something away, the one that shall do so first in front.

    key_of  of a node; a use never makes it smaller
    may_go  whether a node has something to give away now
    """

    def __init__(
        self, key_of: Callable[[Node], EvictionKey], may_go: Callable[[Node], bool]
    ) -> None:
        self._key_of = key_of
        self._may_go = may_go
        self._num_notes = 0
        # At most one note per node. A note grows stale when its node is used or locked; whoever
        # takes it from the heap then writes a new one, or none.
        self._notes: list[tuple[EvictionKey, int, Node]] = []
        self._noted: set[Node] = set()

    def __len__(self) -> int:
        return len(self._notes)

    def __contains__(self, node: Node) -> bool:
        return node in self._noted

    def offer(self, node: Node) -> None:
        """Note the node if it may go."""
        if node in self._noted or not self._may_go(node):
            return
        self._noted.add(node)
        self._num_notes += 1
        heapq.heappush(self._notes, (self._key_of(node), self._num_notes, node))

    def take(self) -> Node | None:
        """The node that shall go first; whoever takes it offers it again if something is left."""
        while self._notes:
            key, _, node = heapq.heappop(self._notes)
            self._noted.remove(node)
            if key != self._key_of(node):
                self.offer(node)
            elif self._may_go(node):
                return node
        return None
