"""Attention of several requests to the pages that they share, computed once for all of them.

A tile's rows are tokens of different requests, which all attend to the first `shared_len` tokens of
one of them; kernels/shared_prefixes.py finds such requests. The other kernels attend to each
request's further tokens (see their `shared_len`), and the merge joins both by log-sum-exp.

Source: Juravsky et al. 2024, arXiv:2402.05099 (Hydragen); Ye et al. 2024, "Cascade inference".
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from sapwood.kernels.triton.attention_core import attend, chunk_of_keys, load_queries, store


@triton.jit(do_not_specialize=["page_table_stride", "num_splits", "num_parts"])
def shared_kernel(
    q, key_cache, value_cache, key_scales, value_scales, page_table, context_len, query_start,
    tile_tokens, tile_requests, shared_len, parts, part_lse, alibi, scale,
    q_token_stride, q_head_stride, page_table_stride,
    key_page_stride, key_head_stride, key_token_stride,
    value_page_stride, value_head_stride, value_token_stride,
    num_heads, num_splits, num_parts,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KV: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MIN_CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (num_splits, Hk, tiles); writes parts 0 .. num_splits.

    tile_tokens    [tiles, BLOCK_M // GROUP] int32: rows of q; -1 where a tile is not full
    tile_requests  the same shape: their requests; the first one's pages are read, and a tile whose
                   first one is -1 is empty"""
    split, kv_head = tl.program_id(0), tl.program_id(1)
    tile = tl.program_id(2)
    tile_size: tl.constexpr = BLOCK_M // GROUP
    owner = tl.load(tile_requests + tile * tile_size)
    if owner >= 0:
        row = tl.arange(0, BLOCK_M)
        in_tile = row < tile_size * GROUP
        token = tl.load(tile_tokens + tile * tile_size + row // GROUP, mask=in_tile, other=-1)
        is_row = token >= 0
        token = tl.maximum(token, 0)
        head = kv_head * GROUP + row % GROUP
        end = tl.load(shared_len + owner)
        low = 0
        position = token
        if WINDOW != 0 or alibi is not None:
            request = tl.load(tile_requests + tile * tile_size + row // GROUP, mask=is_row, other=0)
            last = tl.load(context_len + request, mask=is_row, other=0)
            position = last - tl.load(query_start + request + 1, mask=is_row, other=0) + token
        if WINDOW != 0:
            nearest = tl.min(tl.where(is_row, position, 2147483647), 0)
            low = tl.maximum(nearest - WINDOW + 1, 0)
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
            pages = page_table + owner.to(tl.int64) * page_table_stride
            slope = highest
            if alibi is not None:
                slope = tl.load(alibi + head, mask=is_row, other=0.0)
            masked_from = start
            if WINDOW == 0:
                masked_from = start + (stop - start) // BLOCK_N * BLOCK_N
                highest, total, weighted = attend(
                    queries, highest, total, weighted,
                    keys, values, key_scales, value_scales,
                    pages, start, masked_from, low, position, slope,
                    key_page_stride, key_token_stride, value_page_stride, value_token_stride, scale,
                    HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, KV, SOFT_CAP, WINDOW, False, False,
                    alibi is not None,
                )  # fmt: skip
            highest, total, weighted = attend(
                queries, highest, total, weighted,
                keys, values, key_scales, value_scales, pages, masked_from, stop, low, position,
                slope,
                key_page_stride, key_token_stride, value_page_stride, value_token_stride, scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, KV, SOFT_CAP, WINDOW, False, True,
                alibi is not None,
            )  # fmt: skip
        store(
            highest, total, weighted, token, head, is_row,
            None, parts, part_lse, None, num_heads, num_parts, split,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
