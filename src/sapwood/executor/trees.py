"""What a step with trees of drafts needs: positions by depth, who sees whom, and keys and values
that move together once it is known which drafts were right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.rows import RowTable
from sapwood.kernels.kv_cache import move_tokens
from sapwood.kernels.transfer import upload
from sapwood.memory.buffers import whole_pools
from sapwood.schema.draft_tree import depths, seen_nodes
from sapwood.schema.step import ScheduledTokens

SEES_ALL = -1


def lay_out(
    scheduled: Sequence[ScheduledTokens],
    starts: Sequence[int],
    positions: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """(the positions of tokens by their depth in trees, `AttentionBatch.sees`); None without trees.

    starts     of each entry among the step's T tokens
    positions  [T] of the tokens' places in their requests, which are those of chains
    """
    if not any(entry.draft_parents for entry in scheduled):
        return None
    by_depth, sees = positions.copy(), np.full(len(positions), SEES_ALL, dtype=np.int64)
    for entry, start in zip(scheduled, starts, strict=True):
        if not entry.draft_parents:
            continue
        num_known = entry.num_new - len(entry.draft_ids)
        first, end = start + num_known, start + entry.num_new
        by_depth[first:end] = positions[first] - 1 + np.array(depths(entry.draft_parents))
        known = (1 << num_known) - 1
        sees[first:end] = np.array(
            [known | nodes << num_known for nodes in seen_nodes(entry.draft_parents)],
            dtype=np.uint64,
        ).view(np.int64)
    return by_depth, sees


def moves_of(entry: ScheduledTokens, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Which drafts of an entry have to move: (from, to), indices of drafts, if it brought these
    tokens. Those that were right come first afterwards, in their order."""
    if not entry.draft_parents:
        return []
    right = entry.right_drafts(token_ids)
    return [(draft, place) for place, draft in enumerate(right) if draft != place]


class TreeMover:
    """Moves what the right drafts of trees left behind to where a chain would have left it."""

    def __init__(self, rows: RowTable, caches: Sequence[tuple[Tensor, ...]]) -> None:
        """caches  of the layers, which keep every token: [pages, heads, page_size, width] each"""
        self._rows = rows
        self._pools = whole_pools(caches)

    def move(
        self, entries: Sequence[ScheduledTokens], chosen: Sequence[Sequence[int]]
    ) -> dict[int, list[tuple[int, int]]]:
        """Move keys and values. Returns what moved, as `moves_of`, by index in `entries`.

        chosen  tokens that each entry brought"""
        found: dict[int, list[tuple[int, int]]] = {}
        places: list[tuple[int, int, int]] = []
        for index, (entry, token_ids) in enumerate(zip(entries, chosen, strict=True)):
            moves = moves_of(entry, token_ids)
            if moves:
                found[index] = moves
                first = entry.end - len(entry.draft_ids)
                places += [(entry.row, first + source, first + to) for source, to in moves]
        if not places:
            return found
        row, source, to = np.array(places, dtype=np.int64).T
        for cache in self._pools:
            size = cache.shape[2]
            at = [self._write_index(row, source, size), self._write_index(row, to, size)]
            move_tokens(cache, *upload(at, cache.device))
        return found

    def _write_index(
        self, row: NDArray[np.int64], token: NDArray[np.int64], page_size: int
    ) -> NDArray[np.int64]:
        page, offset = np.divmod(token, page_size)
        return self._rows.page_table[row, page] * np.int64(page_size) + offset
