"""Which requests attend to shared pages together: groups of them, cut into tiles of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.kernels.interface import AttentionBatch
from sapwood.kernels.shared_prefixes import SharedPrefix, find_shared_prefixes
from sapwood.kernels.triton.attention_sizes import MAX_GROUP, tile_sizes

_SHARED_QUERY_LEN = 16
"""Requests with more new tokens fill tiles with rows of their own: sharing saves nothing. A batch
that has one shares pages only among its decodes, so that a long prompt is not merged from parts."""

_WORTH_SHARING = 16_384
"""Tokens' reads that shared pages must save per key and value head: two more launches and the
merge cost about 10 us, in which an H200 reads that many tokens of 8 heads of 128 from its L2 cache,
where the pages of a shared prefix mostly are. An estimate; not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTiles:
    """The tiles of requests that share pages; the same for all layers of a step.

    tokens      [tiles, tokens per tile] int32: rows of q; -1 where there is none
    requests    the same shape: the tokens' requests; -1 where there is none
    shared_len  [R] int32: so many first tokens of a request are attended to in a tile
    """

    tokens: Tensor
    requests: Tensor
    shared_len: Tensor


def extends_share(batch: AttentionBatch) -> bool:
    """Whether requests that are no decodes may be in groups too."""
    return max(batch.query_lens) <= _SHARED_QUERY_LEN


def shared_tiles(batch: AttentionBatch, page_size: int, tokens_per_tile: int) -> SharedTiles | None:
    """The step's tiles, made by its first layer; None if no shared pages are worth it."""
    key = shared_tiles_key(tokens_per_tile)
    if key not in batch.cache:
        groups = shared_groups(batch, page_size, tokens_per_tile)
        tiles = make_shared_tiles(batch, groups, page_size, tokens_per_tile) if groups else None
        batch.cache[key] = tiles
    return cast("SharedTiles | None", batch.cache[key])


def shared_tokens_per_tile(q: Tensor, key_cache: Tensor) -> int:
    """The width of SharedTiles for such queries and keys."""
    group = q.shape[1] // key_cache.shape[1]
    return tile_sizes(MAX_GROUP, group, q.shape[2], q.dtype).tokens(group)


def shared_tiles_key(tokens_per_tile: int) -> str:
    """Where tiles are in `AttentionBatch.cache`: a runtime that captures a graph puts its own
    there, whose tensors it rewrites before each replay."""
    return f"triton shared {tokens_per_tile}"


def shared_groups(
    batch: AttentionBatch, page_size: int, tokens_per_tile: int
) -> list[SharedPrefix]:
    """The groups of requests for which attending to shared pages once is worth it.

    Pages of new tokens are left out, for these are not seen by all of a request's rows. Nothing is
    found without `batch.host_page_table`."""
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
    batch: AttentionBatch,
    groups: list[SharedPrefix],
    page_size: int,
    tokens_per_tile: int,
    num_tiles: int | None = None,
) -> SharedTiles:
    """The groups' tokens in tiles. With `num_tiles`, empty tiles are added up to that number, so
    that a captured graph's grid fits; ValueError if there are more."""
    start = np.cumsum([0, *batch.query_lens])
    shared_len = np.zeros(len(batch.query_lens), dtype=np.int32)
    tiles: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for group in groups:
        members = np.array(group.requests)
        shared_len[members] = group.num_pages * page_size
        lens = np.array([batch.query_lens[request] for request in group.requests])
        requests = members.repeat(lens)
        tokens = np.concatenate([np.arange(start[r], start[r + 1]) for r in group.requests])
        for begin in range(0, len(tokens), tokens_per_tile):
            here = slice(begin, begin + tokens_per_tile)
            tiles.append((tokens[here], requests[here]))
    if num_tiles is not None and len(tiles) > num_tiles:
        raise ValueError(f"{len(tiles)} tiles of shared pages do not fit in {num_tiles}")
    table = np.full((2, num_tiles or len(tiles), tokens_per_tile), -1, dtype=np.int32)
    for index, (tokens, requests) in enumerate(tiles):
        table[0, index, : len(tokens)] = tokens
        table[1, index, : len(tokens)] = requests

    device = batch.page_table.device
    host = torch.from_numpy(np.concatenate([table.ravel(), shared_len]))
    # From pinned memory the copy waits for nothing; torch keeps that memory until it is done.
    there = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    tokens_there, requests_there = there[: table.size].view(table.shape)
    return SharedTiles(tokens=tokens_there, requests=requests_there, shared_len=there[table.size :])
