"""Attention in which a token's result depends on its query and its keys alone.

Keys are cut into chunks at fixed positions, multiples of CHUNK, wherever a step begins and whoever
else is in it. Each chunk has a softmax of its own, and these are merged one after the other: by one
program where a request has several new tokens, which saves the memory of the parts, and by a kernel
of its own for decodes, whose chunks are attended to side by side. Both do the same operations:
tiles have one size, every block of keys goes through the masked loop, and products and sums are not
fused (where the compiler fuses them depends on the code around).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
from __future__ import annotations

import triton
import triton.language as tl

from sapwood.kernels.triton.attention_core import LOG2E, attend, finish, load_queries
from sapwood.kernels.triton.attention_extend import _request_of


@triton.jit
def _merged(highest, total, weighted, lse, value):
    """The state of the chunks so far, as in attention_core.attend, with one more: `value` [M, D] is
    its result, `lse` [M] log2 of its sum of 2^score, -inf if it has no key."""
    higher = tl.maximum(highest, lse)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(lse - base)
    rescale = tl.exp2(highest - base)
    total = total * rescale + weight
    weighted = weighted * rescale[:, None] + value * weight[:, None]
    return higher, total, weighted


@triton.jit
def _store(highest, total, weighted, row, head, is_row, out, sinks,
           HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows of all chunks into `out`; `row` [M] counts heads of tokens."""
    sink = highest
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_row, other=0.0) * LOG2E
    factor, divisor = finish(highest, total, sink, sinks is not None)
    entry = tl.arange(0, BLOCK_D)
    result = weighted * (factor / divisor)[:, None]
    mask = is_row[:, None] & (entry < HEAD_DIM)[None, :]
    where = (row * HEAD_DIM)[:, None] + entry[None, :]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["page_table_stride", "num_requests", "num_tiles", "num_parts"]
)  # fmt: skip
def fixed_kernel(
    q, key_cache, value_cache, key_scales, value_scales,
    page_table, context_len, query_start,
    out, parts, part_lse, sinks, alibi, sees, scale,
    q_token_stride, q_head_stride, page_table_stride,
    key_page_stride, key_head_stride, key_token_stride,
    value_page_stride, value_head_stride, value_token_stride,
    num_heads, num_requests, num_tiles, num_parts,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KV: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (1, Hk, num_tiles), or with `parts` (num_parts, Hk, num_tiles): each program attends to
    one chunk and stores it as attention_core.store does. Else as attention_extend.extend_kernel."""
    kv_head = tl.program_id(1)
    tile = num_tiles - 1 - tl.program_id(2)
    tile_tokens: tl.constexpr = BLOCK_M // GROUP
    request, first_tile = _request_of(tile, query_start, num_requests, tile_tokens)
    query_begin = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - query_begin
    tile_begin = (tile - first_tile) * tile_tokens
    if tile_begin < query_len:
        row = tl.arange(0, BLOCK_M)
        entry = tl.arange(0, BLOCK_D)
        in_request = tile_begin + row // GROUP
        is_row = (row < tile_tokens * GROUP) & (in_request < query_len)
        head = kv_head * GROUP + row % GROUP
        token = query_begin + in_request
        num_cached = tl.load(context_len + request) - query_len
        position = num_cached + in_request
        end = num_cached + tl.minimum(tile_begin + tile_tokens, query_len)
        low = 0
        if WINDOW != 0:
            low = tl.maximum(num_cached + tile_begin - WINDOW + 1, 0)
        queries = load_queries(
            q, token, head, is_row, q_token_stride, q_head_stride, HEAD_DIM, BLOCK_D
        )
        keys = key_cache + kv_head.to(tl.int64) * key_head_stride
        values = value_cache + kv_head.to(tl.int64) * value_head_stride
        if KV != "":
            key_scales += kv_head.to(tl.int64) * (key_head_stride // 2)
            value_scales += kv_head.to(tl.int64) * (value_head_stride // 2)
        pages = page_table + request.to(tl.int64) * page_table_stride
        none = tl.full([BLOCK_M], float("-inf"), tl.float32)
        slope = none
        if alibi is not None:
            slope = tl.load(alibi + head, mask=is_row, other=0.0)
        row_sees = None
        if sees is not None:
            row_sees = tl.load(sees + token, mask=is_row, other=-1)
        first_chunk, last_chunk = low // CHUNK, tl.cdiv(end, CHUNK)
        if parts is not None:
            first_chunk = tl.program_id(0)
            last_chunk = first_chunk + 1
        of_all, total_of_all = none, tl.zeros([BLOCK_M], tl.float32)
        weighted_of_all = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        place = token.to(tl.int64) * num_heads + head
        for chunk in range(first_chunk, last_chunk):
            # Blocks begin at multiples of their size, whatever the first key of a window is.
            start = tl.maximum(chunk * CHUNK, low // BLOCK_N * BLOCK_N)
            stop = tl.minimum(chunk * CHUNK + CHUNK, end)
            highest, total, weighted = attend(
                queries, none, tl.zeros([BLOCK_M], tl.float32),
                tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
                keys, values, key_scales, value_scales, pages, start, stop, low, position, slope,
                key_page_stride, key_token_stride, value_page_stride, value_token_stride, scale,
                HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, KV, SOFT_CAP, WINDOW, True, True,
                alibi is not None, row_sees, num_cached,
            )  # fmt: skip
            sees_keys = total > 0
            divisor = tl.where(sees_keys, total, 1.0)
            lse = tl.where(sees_keys, highest + tl.log2(divisor), float("-inf"))
            value = weighted / divisor[:, None]
            if parts is None:
                of_all, total_of_all, weighted_of_all = _merged(
                    of_all, total_of_all, weighted_of_all, lse, value
                )
            else:
                slot = place * num_parts + chunk
                tl.store(part_lse + slot, lse, mask=is_row)
                mask = (is_row & sees_keys)[:, None] & (entry < HEAD_DIM)[None, :]
                tl.store(parts + (slot * HEAD_DIM)[:, None] + entry[None, :], value, mask=mask)
        if parts is None:
            _store(
                of_all, total_of_all, weighted_of_all, place, head, is_row, out, sinks,
                HEAD_DIM, BLOCK_D,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def fixed_merge_kernel(
    parts, part_lse, sinks, out, num_heads, num_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, Hq): the chunks of a decode, in their order."""
    one = tl.zeros([1], tl.int64)
    row = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1) + one
    entry = tl.arange(0, BLOCK_D)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1, BLOCK_D], tl.float32)
    for part in range(num_parts):
        slot = row * num_parts + part
        lse = tl.load(part_lse + slot)
        # A part that saw no key was not written.
        mask = (lse > float("-inf"))[:, None] & (entry < HEAD_DIM)[None, :]
        where = parts + (slot * HEAD_DIM)[:, None] + entry[None, :]
        value = tl.load(where, mask=mask, other=0.0)
        highest, total, weighted = _merged(highest, total, weighted, lse, value)
    head = tl.program_id(1) + one
    _store(highest, total, weighted, row, head, one == 0, out, sinks, HEAD_DIM, BLOCK_D)
