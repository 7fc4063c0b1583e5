"""Finds the requests of a batch that have their first pages in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """Pages with which several requests begin.

    requests   two or more rows of the page table, in ascending order
    num_pages  number of entries that are equal at the beginning of all these rows
    """

    requests: tuple[int, ...]
    num_pages: int

    @property
    def num_saved_pages(self) -> int:
        """Number of page reads that are saved if each shared page is read once for all."""
        return (len(self.requests) - 1) * self.num_pages


@dataclass(slots=True)
class _Node:
    """The requests that have their first `depth` pages, and not one more, in common.

    num_loose  number of members that are in none of the node's children
    gains      for each number of pages that a group further up may share: (page reads that the
               members save if that group takes them, whether this node forms a group for that)
    """

    members: NDArray[np.int64]
    depth: int
    parent: int
    num_loose: int
    children: list[int] = field(default_factory=list)
    gains: dict[int, tuple[int, bool]] = field(default_factory=dict)


def find_shared_prefixes(
    page_table: NDArray[np.int32], num_pages: Sequence[int]
) -> list[SharedPrefix]:
    """Groups of requests, each request in at most one, that together save the most page reads.

    page_table  [R, max_pages]
    num_pages   per request: number of its pages that may be shared; 0 keeps it out of every group

    Groups have one level. For instance, if all requests have the same system prompt and some of
    them the same examples too, the latter may form a group that reads the system prompt once more.
    """
    nodes = _prefix_tree(page_table, np.asarray(num_pages, dtype=np.int64))
    for node in reversed(nodes):
        _weigh(nodes, node)
    return _choose(nodes)


def _prefix_tree(page_table: NDArray[np.int32], limits: NDArray[np.int64]) -> list[_Node]:
    """Parents come before children. The first is the root: all requests, no page."""
    nodes: list[_Node] = []
    pending = [(np.flatnonzero(limits), -1)]
    while pending:
        members, parent = pending.pop()
        depth = 0 if parent < 0 else _common(page_table[members, : int(limits[members].min())])
        children = _by_page(page_table, members[limits[members] > depth], depth)
        num_loose = len(members) - sum(len(child) for child in children)
        if parent >= 0:
            nodes[parent].children.append(len(nodes))
        pending += [(child, len(nodes)) for child in children]
        nodes.append(_Node(members, depth, parent, num_loose))
    return nodes


def _common(rows: NDArray[np.int32]) -> int:
    """Number of columns, from the first on, that are equal in all rows."""
    differs = (rows != rows[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else rows.shape[1]


def _by_page(
    page_table: NDArray[np.int32], members: NDArray[np.int64], index: int
) -> list[NDArray[np.int64]]:
    """The members grouped by their page at `index`; groups of a single member are left out."""
    if members.size < 2:
        return []
    _, group, sizes = np.unique(page_table[members, index], return_inverse=True, return_counts=True)
    return [members[group == number] for number in np.flatnonzero(sizes > 1)]


def _weigh(nodes: list[_Node], node: _Node) -> None:
    """Fill `node.gains`; the children's gains must be filled already.

    A group reads its `depth` pages once, instead of once per member.
    """

    def gain(depth: int) -> int:
        below = sum(nodes[child].gains[depth][0] for child in node.children)
        return node.num_loose * depth + below

    own = gain(node.depth) - node.depth
    above = {0}
    parent = node.parent
    while parent >= 0:
        above.add(nodes[parent].depth)
        parent = nodes[parent].parent
    for depth in above:
        joined = gain(depth)
        node.gains[depth] = (max(own, joined), own > joined)


def _choose(nodes: list[_Node]) -> list[SharedPrefix]:
    owner: dict[int, int] = {}
    above = [0] * len(nodes)
    for index, node in enumerate(nodes):
        above[index] = above[node.parent] if node.parent >= 0 else 0
        if node.gains[above[index]][1]:
            above[index] = node.depth
            owner |= dict.fromkeys(node.members.tolist(), index)
    groups: dict[int, list[int]] = {}
    for request in sorted(owner):
        groups.setdefault(owner[request], []).append(request)
    return [
        SharedPrefix(requests=tuple(requests), num_pages=nodes[index].depth)
        for index, requests in groups.items()
        if len(requests) > 1
    ]
