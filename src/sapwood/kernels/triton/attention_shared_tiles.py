"""Groups of requests that attend to shared pages together, cut into tiles of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.shared_prefixes import SharedPrefix, find_shared_prefixes
from sapwood.kernels.transfer import upload

_SHARED_QUERY_LEN = 16
"""A request with more new tokens than this fills tiles with its own rows: sharing saves nothing.

In a batch with such a request only decodes share pages, so that a long prompt's attention is not
merged from parts.
"""

_WORTH_SHARING = 16_384
"""Tokens' reads that shared pages must save per key and value head: two more launches and the
merge cost about 10 us, in which an H200 reads that many tokens of 8 heads of 128 from its L2 cache,
where the pages of a shared prefix mostly are. An estimate; not measured."""

_SPARE_TILES = 3
"""Tiles of a captured step beyond those that its requests would fill as a single group.

Each further group may have a last tile that is not full.
"""

_CAPTURED = "triton captured tiles"
"""Key of the CapturedTiles in `AttentionBatch.cache`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTiles:
    """The tiles of requests that share pages; the same for all layers of a step.

    tokens      [tiles, tokens per tile] int32: rows of q; -1: none
    requests    [tiles, tokens per tile] int32: the tokens' requests; -1: none
    shared_len  [R] int32: number of a request's first tokens that are attended to in a tile
    """

    tokens: Tensor
    requests: Tensor
    shared_len: Tensor


def extends_share(batch: AttentionBatch) -> bool:
    """Whether the groups may have requests that are no decodes."""
    return max(batch.query_lens) <= _SHARED_QUERY_LEN


def shared_tiles(batch: AttentionBatch, page_size: int, tokens_per_tile: int) -> SharedTiles | None:
    """The step's tiles, which its first layer makes; None if sharing pages is not worth it."""
    captured = cast("CapturedTiles | None", batch.cache.get(_CAPTURED))
    if captured is not None:
        return captured.tiles(tokens_per_tile)
    key = f"triton shared {tokens_per_tile}"
    if key not in batch.cache:
        groups = shared_groups(batch, page_size, tokens_per_tile)
        tiles = make_shared_tiles(batch, groups, page_size, tokens_per_tile) if groups else None
        batch.cache[key] = tiles
    return cast("SharedTiles | None", batch.cache[key])


def shared_groups(
    batch: AttentionBatch, page_size: int, tokens_per_tile: int
) -> list[SharedPrefix]:
    """The groups of requests for which attending to shared pages once is worth it.

    Pages with new tokens are left out, because not all of a request's rows see these tokens. There
    are no groups without `batch.host_page_table`."""
    if batch.host_page_table is None:
        return []
    num_requests = len(batch.query_lens) if extends_share(batch) else batch.num_decodes
    if num_requests < 2:
        return []
    num_pages = [
        (context - query) // page_size
        for context, query in zip(batch.context_lens, batch.query_lens, strict=True)
    ]
    return [
        group
        for group in find_shared_prefixes(batch.host_page_table, num_pages[:num_requests])
        if _reads_saved(batch, group, page_size, tokens_per_tile) >= _WORTH_SHARING
    ]


def _reads_saved(
    batch: AttentionBatch, group: SharedPrefix, page_size: int, tokens_per_tile: int
) -> int:
    num_tokens = sum(batch.query_lens[request] for request in group.requests)
    num_tiles = -(-num_tokens // tokens_per_tile)
    return (len(group.requests) - num_tiles) * group.num_pages * page_size


def make_shared_tiles(
    batch: AttentionBatch, groups: list[SharedPrefix], page_size: int, tokens_per_tile: int
) -> SharedTiles:
    """Tiles with the tokens of these groups."""
    tiles = _tiles_of(batch, groups, tokens_per_tile)
    table = _table(tiles, len(tiles), tokens_per_tile)
    shared_len = _shared_len(groups, len(batch.query_lens), page_size)
    tokens, requests, there = upload([table[0], table[1], shared_len], batch.page_table.device)
    return SharedTiles(tokens=tokens, requests=requests, shared_len=there)


class CapturedTiles:
    """A CapturedSharing: a fixed number of tiles in fixed memory, for a captured step.

    The groups that save the most reads get tiles first; requests of groups that get none read
    their pages alone.
    """

    def __init__(self, num_requests: int, page_size: int, device: torch.device) -> None:
        self._num_requests = num_requests
        self._page_size = page_size
        self._device = device
        self._tiles: dict[int, SharedTiles] = {}

    def install(self, batch: AttentionBatch) -> None:
        batch.cache[_CAPTURED] = self

    def tiles(self, tokens_per_tile: int) -> SharedTiles:
        """The tiles of one width, made when a layer first asks for them, before the capture."""
        if tokens_per_tile not in self._tiles:
            num_tiles = -(-self._num_requests // tokens_per_tile) + _SPARE_TILES
            nobody = torch.full(
                (2, num_tiles, tokens_per_tile), -1, dtype=torch.int32, device=self._device
            )
            shared_len = torch.zeros(self._num_requests, dtype=torch.int32, device=self._device)
            self._tiles[tokens_per_tile] = SharedTiles(
                tokens=nobody[0], requests=nobody[1], shared_len=shared_len
            )
        return self._tiles[tokens_per_tile]

    def plan(self, batch: AttentionBatch) -> bool:
        found = {width: shared_groups(batch, self._page_size, width) for width in self._tiles}
        if not any(found.values()):
            return False
        for width, groups in found.items():
            self._write(batch, groups, width)
        return True

    def _write(self, batch: AttentionBatch, groups: list[SharedPrefix], width: int) -> None:
        there = self._tiles[width]
        chosen: list[SharedPrefix] = []
        left = there.tokens.shape[0]
        for group in sorted(groups, key=lambda group: -group.num_saved_pages):
            num_tiles = -(-len(group.requests) // width)
            if num_tiles <= left:
                chosen.append(group)
                left -= num_tiles
        table = _table(_tiles_of(batch, chosen, width), there.tokens.shape[0], width)
        shared_len = _shared_len(chosen, self._num_requests, self._page_size)
        sources = upload([table[0], table[1], shared_len], self._device)
        torch._foreach_copy_([there.tokens, there.requests, there.shared_len], sources)


_Tile = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Tokens, and their requests."""


def _tiles_of(batch: AttentionBatch, groups: list[SharedPrefix], width: int) -> list[_Tile]:
    start = np.cumsum([0, *batch.query_lens])
    tiles: list[_Tile] = []
    for group in groups:
        lens = np.array([batch.query_lens[request] for request in group.requests])
        requests = np.array(group.requests).repeat(lens)
        tokens = np.concatenate([np.arange(start[r], start[r + 1]) for r in group.requests])
        for begin in range(0, len(tokens), width):
            here = slice(begin, begin + width)
            tiles.append((tokens[here], requests[here]))
    return tiles


def _table(tiles: list[_Tile], num_tiles: int, width: int) -> NDArray[np.int32]:
    """[2, num_tiles, width]: tokens and requests, -1 where there is none."""
    table = np.full((2, num_tiles, width), -1, dtype=np.int32)
    for index, (tokens, requests) in enumerate(tiles):
        table[0, index, : len(tokens)] = tokens
        table[1, index, : len(tokens)] = requests
    return table


def _shared_len(groups: list[SharedPrefix], num_requests: int, page_size: int) -> NDArray[np.int32]:
    shared_len = np.zeros(num_requests, dtype=np.int32)
    for group in groups:
        shared_len[list(group.requests)] = group.num_pages * page_size
    return shared_len
