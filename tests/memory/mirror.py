"""A listener that knows what a prefix tree keeps from its events alone."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.memory.listener import Stretch
from sapwood.memory.node import TOKEN_BYTES, Node
from sapwood.memory.prefix_tree import PrefixTree

Place = tuple[str, bytes, int]
"""(namespace, key of all tokens up to the page's end, pool)"""


class Mirror:
    def __init__(self, page_size: int) -> None:
        self._page_bytes = page_size * TOKEN_BYTES
        self.content: dict[Place, int] = {}
        self.num_evicted = 0
        self.num_removed = 0
        self.num_cleared = 0

    def stored(self, stretch: Stretch) -> None:
        for place, number in self._told(stretch):
            assert place not in self.content, "stored twice"
            self.content[place] = number

    def evicted(self, stretch: Stretch) -> None:
        self.num_evicted += len(stretch.numbers)
        self._drop(stretch)

    def removed(self, stretch: Stretch) -> None:
        self.num_removed += len(stretch.numbers)
        self._drop(stretch)

    def used(self, stretch: Stretch) -> None:
        for place, number in self._told(stretch):
            assert self.content[place] == number

    def cleared(self) -> None:
        self.num_cleared += 1
        self.content.clear()

    def check(self, tree: PrefixTree) -> None:
        found: dict[Place, int] = {}
        for namespace, root in tree._roots.items():
            self._walk(tree, root, namespace, b"", found)
        assert found == self.content

    def _drop(self, stretch: Stretch) -> None:
        for place, number in self._told(stretch):
            assert self.content.pop(place) == number

    def _told(self, stretch: Stretch) -> list[tuple[Place, int]]:
        return self._places(*stretch.place, stretch.pool, stretch.numbers)

    def _places(
        self, namespace: str, key: bytes, pool: int, numbers: Sequence[int]
    ) -> list[tuple[Place, int]]:
        end = len(key)
        return [
            ((namespace, key[: end - back * self._page_bytes], pool), number)
            for back, number in enumerate(reversed(numbers))
        ]

    def _walk(
        self, tree: PrefixTree, node: Node, namespace: str, above: bytes, found: dict[Place, int]
    ) -> None:
        key = above + node.key
        parts = [(tree._full, node.pages)]
        parts += [
            (pool, part.pages) for pool, part in zip(tree._window_pools, node.windows, strict=True)
        ]
        parts.append((tree._state, [] if node.state is None else [node.state]))
        for pool, numbers in parts:
            found |= dict(self._places(namespace, key, pool, numbers))
        for child in node.children.values():
            self._walk(tree, child, namespace, key, found)
