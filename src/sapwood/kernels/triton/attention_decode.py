"""Decode attention: one new token per request, the keys of each split over several programs.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; Kwon et al. 2023,
arXiv:2309.06180 (paged keys and values).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from sapwood.kernels.triton.attention_core import attend, chunk_of_keys, load_queries, store


@triton.jit(do_not_specialize=["page_table_stride", "num_splits", "num_parts", "first_part"])
def decode_kernel(
    q, key_cache, value_cache, key_scales, value_scales, page_table, context_len, shared_len,
    out, parts, part_lse, sinks, alibi, scale,
    q_token_stride, q_head_stride, page_table_stride,
    key_page_stride, key_head_stride, key_token_stride,
    value_page_stride, value_head_stride, value_token_stride,
    num_heads, num_splits, num_parts, first_part,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KV: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MIN_CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (num_splits, Hk, requests). Row r of a tile is query head kv_head * GROUP + r; request i
    has token i. `shared_len` [R] counts first tokens that another kernel attends to; None: none.
    """
    split, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, BLOCK_M)
    is_row = row < GROUP
    head = kv_head * GROUP + row
    token = tl.zeros([BLOCK_M], tl.int32) + request
    end = tl.load(context_len + request)
    low = 0
    if WINDOW != 0:
        low = tl.maximum(end - WINDOW, 0)
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
        position = token * 0 + end - 1
        slope = highest
        if alibi is not None:
            slope = tl.load(alibi + head, mask=is_row, other=0.0)
        masked_from = start
        if WINDOW == 0:
            masked_from = start + (stop - start) // BLOCK_N * BLOCK_N
            highest, total, weighted = attend(
                queries, highest, total, weighted,
                keys, values, key_scales, value_scales, pages, start, masked_from, low, position,
                slope,
                key_page_stride, key_token_stride, value_page_stride, value_token_stride, scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, KV, SOFT_CAP, 0, False, False,
                alibi is not None,
            )  # fmt: skip
        # The newest token sees every key from `low` on: no comparison of positions is needed.
        highest, total, weighted = attend(
            queries, highest, total, weighted,
            keys, values, key_scales, value_scales, pages, masked_from, stop, low, position,
            slope,
            key_page_stride, key_token_stride, value_page_stride, value_token_stride, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, KV, SOFT_CAP, 0, False, True,
            alibi is not None,
        )  # fmt: skip
    store(
        highest, total, weighted, token, head, is_row,
        out, parts, part_lse, sinks, num_heads, num_parts, first_part + split,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
