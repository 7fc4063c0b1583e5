"""What the prefix tree tells those who follow its content: events and further tiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sapwood.memory.namespace import renamed
from sapwood.memory.node import TOKEN_BYTES, Node
from sapwood.schema.kv_events import PageHash


@dataclass(frozen=True, slots=True)
class Stretch:
    """Pages of one node, or its state. To be looked at only while the listener is called.

    pool     index of the pool
    end      pages of tokens from the beginning of the node to the end of these, or to the state
    numbers  pages in their order; or the slot of one state
    """

    node: Node
    pool: int
    end: int
    numbers: Sequence[int]
    page_size: int

    @property
    def place(self) -> tuple[str, bytes]:
        """(namespace, all tokens of the prefix up to the end of these); the namespace of a branch
        is its mark and its base's. Takes time for each token."""
        keys: list[bytes] = []
        marks = ""
        node = self.node
        while node.parent is not None:
            keys.append(node.key)
            marks += self._mark_of(node).decode()
            node = node.parent
        assert node.namespace is not None
        keys[0] = keys[0][: self.end * self._page_bytes]
        return marks + node.namespace, b"".join(reversed(keys))

    @property
    def tokens(self) -> bytes:
        """Of these pages alone (see `token_key`)."""
        end = self.end * self._page_bytes
        return self.node.key[end - len(self.numbers) * self._page_bytes : end]

    @property
    def digests(self) -> list[bytes]:
        """Of these pages, or of the last page before the state: each stands for its namespace and
        all tokens up to the page's end (see `PageHash`)."""
        digests = _digests_of(self.node, self._page_bytes)
        return digests[self.end - len(self.numbers) : self.end]

    @property
    def digest_before(self) -> bytes | None:
        """Of the page before these; None: they begin a prefix."""
        digests, first = _digests_of(self.node, self._page_bytes), self.end - len(self.numbers)
        if first:
            return digests[first - 1]
        parent = self.node.parent
        return parent.digests[-1] if parent is not None and parent.digests else None

    def digests_under(self, root: str, rename: Callable[[str], str]) -> list[bytes]:
        """The digests that these pages have where the namespace of the root is called `root`, and
        each branch as `rename` says. Takes time for each page of the prefix."""
        path: list[Node] = []
        node = self.node
        while node.parent is not None:
            path.append(node)
            node = node.parent
        digest = PageHash.seed(root)
        digests: list[bytes] = []
        for node in reversed(path):
            mark = renamed(self._mark_of(node).decode(), rename)
            if mark:
                digest = PageHash.of(digest, mark.encode())
            digests = []
            for at in range(node.length):
                digest = PageHash.of(
                    digest, node.key[at * self._page_bytes : (at + 1) * self._page_bytes]
                )
                digests.append(digest)
        return digests[self.end - len(self.numbers) : self.end]

    @property
    def names(self) -> tuple[str, str]:
        """(the root's namespace, the marks of all branches on the way)"""
        marks, node = "", self.node
        while node.parent is not None:
            marks += self._mark_of(node).decode()
            node = node.parent
        return node.namespace or "", marks

    @property
    def page_before(self) -> int | None:
        """The page before these in the pool that keeps every token; None: they begin a prefix, or
        there is no such pool. To be asked for pages of that pool."""
        first = self.end - len(self.numbers)
        if first:
            return self.node.pages[first - 1]
        parent = self.node.parent
        return parent.pages[-1] if parent is not None and parent.pages else None

    @property
    def root(self) -> str | None:
        """The namespace whose prefix begins with these; None: it begins before."""
        parent = self.node.parent
        assert parent is not None
        return parent.namespace if self.end == len(self.numbers) else None

    @property
    def mark(self) -> str:
        """Of the branch that begins with these; "": none does."""
        return self._mark_of(self.node).decode() if self.end == len(self.numbers) else ""

    def _mark_of(self, node: Node) -> bytes:
        return node.place[: -self._page_bytes]

    @property
    def _page_bytes(self) -> int:
        return self.page_size * TOKEN_BYTES


def _digests_of(node: Node, page_bytes: int) -> list[bytes]:
    """Of all pages of tokens of the node; they are found once, and kept with it."""
    lacking: list[Node] = []
    while node.parent is not None and not node.digests:
        lacking.append(node)
        node = node.parent
    digest = node.digests[-1] if node.digests else PageHash.seed(node.namespace or "")
    for node in reversed(lacking):
        mark = node.place[:-page_bytes]
        if mark:
            digest = PageHash.of(digest, mark)
        for at in range(node.length):
            digest = PageHash.of(digest, node.key[at * page_bytes : (at + 1) * page_bytes])
            node.digests.append(digest)
    return node.digests


class CacheListener(Protocol):
    """Hears of every page and state that the tree begins or ceases to keep."""

    def stored(self, stretch: Stretch) -> None:
        """The tree keeps them from now on."""
        ...

    def evicted(self, stretch: Stretch) -> None:
        """They make room. Their content stays until the next plan is executed."""
        ...

    def removed(self, stretch: Stretch) -> None:
        """They are forgotten because somebody asked for it, or taken over by a request."""
        ...

    def used(self, stretch: Stretch) -> None:
        """A request goes on from a prefix that has them."""
        ...

    def cleared(self) -> None:
        """All that the tree kept is forgotten on request; told instead of `removed`."""
        ...


class Listeners:
    """Several listeners as one, told in their order."""

    def __init__(self, *listeners: CacheListener) -> None:
        self._listeners = listeners

    def stored(self, stretch: Stretch) -> None:
        for one in self._listeners:
            one.stored(stretch)

    def evicted(self, stretch: Stretch) -> None:
        for one in self._listeners:
            one.evicted(stretch)

    def removed(self, stretch: Stretch) -> None:
        for one in self._listeners:
            one.removed(stretch)

    def used(self, stretch: Stretch) -> None:
        for one in self._listeners:
            one.used(stretch)

    def cleared(self) -> None:
        for one in self._listeners:
            one.cleared()
