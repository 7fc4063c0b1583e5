"""Extend attention: several new tokens per request after a cached prefix, causal, ragged batch.

Programs find their request themselves: with BLOCK_Q tokens to a tile, request r begins at tile
(query_start[r] - query_start[0]) // BLOCK_Q + r. This grows by at least the tiles that a request
needs, so that a grid of num_tokens // BLOCK_Q + num_requests tiles is enough, whatever the lengths:
it needs no lengths on the host. Tiles that are left over end at once.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from sapwood.kernels.triton.attention_core import attend, chunk_of_keys, load_queries, store

_STARTS = tl.constexpr(128)
"""Starts of requests that are compared at once."""


@triton.jit
def _request_of(tile, query_start, num_requests, BLOCK_Q: tl.constexpr):
    """(request, its first tile)"""
    origin = tl.load(query_start)
    num_begun = tile * 0
    for begin in range(0, num_requests, _STARTS):
        index = begin + tl.arange(0, _STARTS)
        start = tl.load(query_start + index, mask=index < num_requests, other=0)
        has_begun = (start - origin) // BLOCK_Q + index <= tile
        num_begun += tl.sum((has_begun & (index < num_requests)).to(tl.int32), 0)
    request = num_begun - 1
    return request, (tl.load(query_start + request) - origin) // BLOCK_Q + request


@triton.jit(
    do_not_specialize=[
        "page_table_stride", "num_requests", "num_tiles", "num_splits", "num_parts", "first_part",
    ]
)  # fmt: skip
def extend_kernel(
    q, key_cache, value_cache, key_scales, value_scales,
    page_table, context_len, query_start, shared_len,
    out, parts, part_lse, sinks, alibi, sees, scale,
    q_token_stride, q_head_stride, page_table_stride,
    key_page_stride, key_head_stride, key_token_stride,
    value_page_stride, value_head_stride, value_token_stride,
    num_heads, num_requests, num_tiles, num_splits, num_parts, first_part,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KV: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MIN_CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (num_splits, Hk, num_tiles). Row r of a tile is its token r // GROUP, query head
    kv_head * GROUP + r % GROUP. The tensors of requests begin with the first one that is meant;
    rows of q and out are counted from the batch's first."""
    split, kv_head = tl.program_id(0), tl.program_id(1)
    # The last tiles have the most keys: they begin first, and short ones fill the end.
    tile = num_tiles - 1 - tl.program_id(2)
    tile_tokens: tl.constexpr = BLOCK_M // GROUP
    request, first_tile = _request_of(tile, query_start, num_requests, tile_tokens)
    query_begin = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - query_begin
    tile_begin = (tile - first_tile) * tile_tokens
    if tile_begin < query_len:
        row = tl.arange(0, BLOCK_M)
        in_request = tile_begin + row // GROUP
        is_row = (row < tile_tokens * GROUP) & (in_request < query_len)
        head = kv_head * GROUP + row % GROUP
        token = query_begin + in_request
        num_cached = tl.load(context_len + request) - query_len
        position = num_cached + in_request
        first_position = num_cached + tile_begin
        end = num_cached + tl.minimum(tile_begin + tile_tokens, query_len)
        low = 0
        if WINDOW != 0:
            low = tl.maximum(first_position - WINDOW + 1, 0)
        if shared_len is not None:
            low = tl.maximum(low, tl.load(shared_len + request))
        start, stop = chunk_of_keys(low, end, split, num_splits, MIN_CHUNK, BLOCK_N, PAGE_SIZE)

        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if start < stop:
            queries = load_queries(
                q, token, head, is_row, q_token_stride, q_head_stride, HEAD_DIM, BLOCK_D
            )
            keys = key_cache + kv_head.to(tl.int64) * key_head_stride
            values = value_cache + kv_head.to(tl.int64) * value_head_stride
            if KV != "":
                key_scales += kv_head.to(tl.int64) * (key_head_stride // 2)
                value_scales += kv_head.to(tl.int64) * (value_head_stride // 2)
            pages = page_table + request.to(tl.int64) * page_table_stride
            slope = highest
            if alibi is not None:
                slope = tl.load(alibi + head, mask=is_row, other=0.0)
            row_sees = None
            if sees is not None:
                row_sees = tl.load(sees + token, mask=is_row, other=-1)
            masked_from = start
            if WINDOW == 0:
                first_masked = first_position + 1 if sees is None else num_cached
                seen_by_all = tl.maximum(tl.minimum(stop, first_masked) - start, 0)
                masked_from = start + seen_by_all // BLOCK_N * BLOCK_N
                highest, total, weighted = attend(
                    queries, highest, total, weighted,
                    keys, values, key_scales, value_scales,
                    pages, start, masked_from, low, position, slope,
                    key_page_stride, key_token_stride, value_page_stride, value_token_stride, scale,
                    HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, KV, SOFT_CAP, WINDOW, True, False,
                    alibi is not None,
                )  # fmt: skip
            highest, total, weighted = attend(
                queries, highest, total, weighted,
                keys, values, key_scales, value_scales, pages, masked_from, stop, low, position,
                slope,
                key_page_stride, key_token_stride, value_page_stride, value_token_stride, scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, KV, SOFT_CAP, WINDOW, True, True,
                alibi is not None, row_sees, num_cached,
            )  # fmt: skip
        store(
            highest, total, weighted, token, head, is_row,
            out, parts, part_lse, sinks, num_heads, num_parts, first_part + split,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
