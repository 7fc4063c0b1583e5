"""Trees of drafts: several guesses of what follows one token.

Node i of a tree is draft i of a span. `parents[i]` is the draft that node i follows, always an
earlier one; ROOT is the span's last known token. No parents at all mean a chain, in which each
draft follows the one before. Drafts that follow the same token differ from each other, so the
tokens that a request takes say which way through the tree it went.
"""

from __future__ import annotations

from collections.abc import Sequence

ROOT = -1
TREE_TOKENS = 64
"""New tokens of a span with a tree at most: the bits of one integer say which of them one sees."""


def depths(parents: Sequence[int]) -> list[int]:
    """Per node: how many tokens it comes after the span's last known one; at least 1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent == ROOT else found[parent] + 1)
    return found


def seen_nodes(parents: Sequence[int]) -> list[int]:
    """Per node: bit i is 1 for node i itself, its parent, the parent's parent, and so on."""
    found: list[int] = []
    for node, parent in enumerate(parents):
        found.append(1 << node | (0 if parent == ROOT else found[parent]))
    return found


def children_of(draft_ids: Sequence[int], parents: Sequence[int]) -> list[list[int]]:
    """The drafts' tokens that follow the root (first entry), draft 0, draft 1, and so on; in the
    order of drafts.

    parents  empty for a chain
    """
    if not parents:
        return [*([token_id] for token_id in draft_ids), []]
    found: list[list[int]] = [[] for _ in range(len(draft_ids) + 1)]
    for token_id, parent in zip(draft_ids, parents, strict=True):
        found[parent + 1].append(token_id)
    return found


def path_of(
    draft_ids: Sequence[int], parents: Sequence[int], token_ids: Sequence[int]
) -> list[int]:
    """The nodes that these tokens are, one after the other from the root; fewer than tokens where
    no draft is the next token.

    parents  empty for a chain
    """
    path: list[int] = []
    at = ROOT
    for token_id in token_ids:
        found = child_of(draft_ids, parents, at, token_id)
        if found is None:
            break
        path.append(found)
        at = found
    return path


def child_of(
    draft_ids: Sequence[int], parents: Sequence[int], node: int, token_id: int
) -> int | None:
    """The draft that follows `node` and is this token; None if there is none."""
    if not parents:
        after = node + 1
        return after if draft_ids[after : after + 1] == [token_id] else None
    for child in range(node + 1, len(draft_ids)):
        if parents[child] == node and draft_ids[child] == token_id:
            return child
    return None
