"""Which worker has seen which beginnings of prompts: a radix tree of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

NODE_BYTES = 512
"""What a node takes besides its text, roughly."""
END_BYTES = 8
"""What closes the JSON of a prompt, such as a bracket; the prompt that goes on from it has none."""


class _Node:
    """A stretch of text below its parent's.

    owners  worker -> moment of its latest prompt with this stretch
    """

    __slots__ = ("children", "owners", "parent", "text")

    def __init__(self, text: bytes, parent: _Node | None) -> None:
        self.text = text
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.owners: dict[str, int] = {}

    def ends_within(self, num_bytes: int) -> bool:
        """Whether a text ends here, when so much of the stretch has passed, or shortly after."""
        if num_bytes < len(self.text) or not self.children:
            return not self.children and len(self.text) - num_bytes <= END_BYTES
        leaves = (child for child in self.children.values() if not child.children)
        return any(len(leaf.text) <= END_BYTES for leaf in leaves)


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known beginning of a text, in bytes, and the worker that saw it last.

    is_whole  whether that was all of an earlier text, but for its end: the text goes on from it
    """

    num_bytes: int
    worker: str | None
    is_whole: bool = False


class TextTree:
    """Beginnings of texts and the workers that have seen them.

    max_bytes  of the tree; what was used least recently is dropped from its leaves on
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._root = _Node(b"", None)
        self._leaves: OrderedDict[_Node, None] = OrderedDict()
        self._moment = 0
        self._forgotten: dict[str, int] = {}
        self.num_bytes = 0
        self.num_nodes = 0

    def match(self, text: bytes, workers: Collection[str]) -> Match:
        """The longest beginning of the text that one of these workers has seen."""
        best = Match(0, None)
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                break
            num_shared = _num_shared(text, at, child.text)
            at += num_shared
            owner = self._latest_owner(child, workers)
            if owner is None:
                break  # who has seen more has seen this too
            best = Match(at, owner, child.ends_within(num_shared))
            if num_shared < len(child.text):
                break
            node = child
        return best

    def insert(self, text: bytes, worker: str) -> None:
        """The worker sees this text now."""
        self._moment += 1
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                child = self._add(text[at:], node)
                at = len(text)
            else:
                num_shared = _num_shared(text, at, child.text)
                if num_shared < len(child.text):
                    child = self._split(child, num_shared)
                at += num_shared
            child.owners[worker] = self._moment
            node = child
        if node in self._leaves:
            self._leaves.move_to_end(node)
        while self.num_bytes > self._max_bytes and self._leaves:
            self._drop(next(iter(self._leaves)))

    def forget(self, worker: str) -> None:
        """What the worker has seen so far counts no longer."""
        self._forgotten[worker] = self._moment

    def _latest_owner(self, node: _Node, workers: Collection[str]) -> str | None:
        latest, found = 0, None
        for worker, moment in node.owners.items():
            is_known = moment > self._forgotten.get(worker, 0)
            if moment > latest and is_known and worker in workers:
                latest, found = moment, worker
        return found

    def _add(self, text: bytes, parent: _Node) -> _Node:
        node = _Node(text, parent)
        parent.children[text[0]] = node
        self._leaves.pop(parent, None)
        self._leaves[node] = None
        self.num_nodes += 1
        self.num_bytes += len(text) + NODE_BYTES
        return node

    def _split(self, node: _Node, num_upper: int) -> _Node:
        """Divide a node in two; returns the upper one."""
        assert node.parent is not None
        upper = _Node(node.text[:num_upper], node.parent)
        upper.owners = dict(node.owners)
        upper.children[node.text[num_upper]] = node
        node.parent.children[node.text[0]] = upper
        node.text, node.parent = node.text[num_upper:], upper
        self.num_nodes += 1
        self.num_bytes += NODE_BYTES
        return upper

    def _drop(self, leaf: _Node) -> None:
        assert leaf.parent is not None
        parent = leaf.parent
        del self._leaves[leaf]
        del parent.children[leaf.text[0]]
        self.num_nodes -= 1
        self.num_bytes -= len(leaf.text) + NODE_BYTES
        if not parent.children and parent is not self._root:
            # Others have used the parent since, or it is as old; it lives a round longer.
            self._leaves[parent] = None


def _num_shared(text: bytes, at: int, other: bytes) -> int:
    """How many bytes of `other` are those of `text` from there on."""
    if text.startswith(other, at):
        return len(other)
    low, high = 0, min(len(other), len(text) - at)
    while low < high:  # the longest shared beginning, by comparing halves at memory speed
        middle = (low + high + 1) // 2
        if text.startswith(other[low:middle], at + low):
            low = middle
        else:
            high = middle - 1
    return low
