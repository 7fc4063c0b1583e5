"""The common part of the attention kernels: the loop over keys, and the storing of results.

Rows of a program's tile are (token, query head) pairs that share one key and value head, so that
each key and value is read once for all query heads of a group. Softmax is computed online, in units
of log2; products of bfloat16 and float16 are accumulated in fp32, products of fp32 are exact ones
("ieee", not TF32).

Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax); Dao 2023, arXiv:2307.08691.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
from __future__ import annotations

import triton
import triton.language as tl

from sapwood.kernels.triton.small_floats import decode

LOG2E = tl.constexpr(1.4426950408889634)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b, in fp32."""
    if _INTERPRETED:
        # The interpreter would multiply bfloat16's bits as if they were integers. Products of 16
        # bits are exact in fp32, as they are on the GPU.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def load_queries(
    q, token, head, is_row, token_stride, head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D]; zero where there is no row and beyond HEAD_DIM."""
    entry = tl.arange(0, BLOCK_D)
    where = token.to(tl.int64) * token_stride + head * head_stride
    mask = is_row[:, None] & (entry < HEAD_DIM)[None, :]
    return tl.load(q + where[:, None] + entry[None, :], mask=mask, other=0.0)


@triton.jit
def chunk_of_keys(
    low, end, split, num_splits,
    MIN_CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """(start, stop) of the keys low .. end that split number `split` attends to; may be empty.

    Whole blocks. Where a block lies in one page, chunks begin at a block's begin, so that the first
    one may begin before `low`.
    """
    first = low
    if PAGE_SIZE % BLOCK_N == 0:
        first = low // BLOCK_N * BLOCK_N
    per_split = tl.cdiv(tl.maximum(end - first, 0), num_splits)
    chunk = tl.maximum(tl.cdiv(per_split, BLOCK_N) * BLOCK_N, MIN_CHUNK)
    start = first + split * chunk
    return start, tl.minimum(start + chunk, end)


@triton.jit
def dequantized(
    numbers, scales, page, offset, page_stride, exists, dtype: tl.constexpr,
    KV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tokens of an 8-bit cache (kernels/kv_cache.py), numbers [N, BLOCK_D] uint8, as `dtype`."""
    where = scales + page * (page_stride // 2) + offset
    scale = tl.load(where, mask=exists, other=0.0) if MASKED else tl.load(where)
    if KV == "int8":
        value = numbers.to(tl.int8, bitcast=True).to(tl.float32)
    elif KV == "fp8_e4m3":
        value = decode(numbers.to(tl.int32), 8, 3, 7)
    else:
        value = decode(numbers.to(tl.int32), 8, 2, 15)
    return (value * scale.to(tl.float32)[:, None]).to(dtype)


@triton.jit
def attend(
    q, highest, total, weighted,
    keys, values, key_scales, value_scales, pages, start, stop, low, position, slope,
    key_page_stride, key_token_stride, value_page_stride, value_token_stride, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KV: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, ALIBI: tl.constexpr,
    sees=None, first_new=0,
):  # fmt: skip
    """One pass over the keys start .. stop; returns (highest, total, weighted) after them.

    q                [M, BLOCK_D]
    highest, total   [M] the highest score so far in log2 units, and the sum of 2^(score - highest)
    weighted         [M, BLOCK_D] the same sum of values
    keys, values     the cache at the program's key and value head
    key_scales, ...  of an 8-bit cache, at the same head: bf16, half as many to a page as bytes
    KV               what the cache is in: "" (q's dtype), "int8", "fp8_e4m3" or "fp8_e5m2"
    pages            the request's row of the page table
    low, position    keys before `low` are not read; position [M] of each row's token
    SOFT_CAP, WINDOW 0 if there is none
    slope            [M] fp32 of each row's query head, used if ALIBI (then `position` is, too)
    MASKED           without it, start .. stop is whole blocks that every row sees all of
    sees             [M] of each row's token, as AttentionBatch has them, or None; bit 0 is for the
                     token at position first_new
    """
    entry = tl.arange(0, BLOCK_D)
    in_head = (entry < HEAD_DIM)[None, :]
    for begin in range(start, stop, BLOCK_N):
        token = begin + tl.arange(0, BLOCK_N)
        exists = (token >= low) & (token < stop)
        if PAGE_SIZE % BLOCK_N == 0:
            page = tl.load(pages + begin // PAGE_SIZE).to(tl.int64)
        elif MASKED:
            page = tl.load(pages + token // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        else:
            page = tl.load(pages + token // PAGE_SIZE).to(tl.int64)
        offset = token % PAGE_SIZE
        key_at = (page * key_page_stride + offset * key_token_stride)[:, None] + entry[None, :]
        value_at = (page * value_page_stride + offset * value_token_stride)[:, None] + entry[
            None, :
        ]
        # What is masked out is not read either: it may be another request's, or NaN.
        if MASKED:
            mask = exists[:, None] & in_head
            key = tl.load(keys + key_at, mask=mask, other=0)
            value = tl.load(values + value_at, mask=mask, other=0)
        elif HEAD_DIM == BLOCK_D:
            key = tl.load(keys + key_at)
            value = tl.load(values + value_at)
        else:
            key = tl.load(keys + key_at, mask=in_head, other=0)
            value = tl.load(values + value_at, mask=in_head, other=0)

        if KV != "":
            key = dequantized(
                key, key_scales, page, offset, key_page_stride, exists, q.dtype, KV, MASKED
            )
            value = dequantized(
                value, value_scales, page, offset, value_page_stride, exists, q.dtype, KV, MASKED
            )

        none = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        score = dot(q, tl.trans(key), none) * scale
        if SOFT_CAP != 0:
            # tanh(|x|) = (1 - e^-2|x|) / (1 + e^-2|x|), in which nothing overflows.
            power = tl.exp2(-tl.abs(score) * (2 * LOG2E / SOFT_CAP))
            capped = SOFT_CAP * (1 - power) / (1 + power)
            score = tl.where(score < 0, -capped, capped)
        if ALIBI:
            distance = (token[None, :] - position[:, None]).to(tl.float32)
            score += slope[:, None] * distance
        score = score * LOG2E
        if MASKED:
            seen = exists[None, :]
            if CAUSAL:
                seen = seen & (token[None, :] <= position[:, None])
            if WINDOW != 0:
                seen = seen & (token[None, :] > position[:, None] - WINDOW)
            if sees is not None:
                bit = token - first_new
                is_of_tree = (bit >= 0) & (bit < 64)
                shift = tl.where(is_of_tree, bit, 0).to(tl.int64)
                is_seen = ((sees[:, None] >> shift[None, :]) & 1) != 0
                seen = seen & (is_seen | ~is_of_tree[None, :])
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        # A row that has seen no key yet has -inf, and -inf - -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(weight, 1)
        weighted = dot(weight.to(value.dtype), value, weighted * rescale[:, None])
        highest = higher
    return highest, total, weighted


@triton.jit
def finish(highest, total, sink, HAS_SINK: tl.constexpr):
    """(factor, divisor) such that weighted * factor / divisor is the result; 0 without keys.

    sink  in log2 units, read if HAS_SINK
    """
    if HAS_SINK:
        top = tl.maximum(highest, sink)
        factor = tl.exp2(highest - top)
        return factor, total * factor + tl.exp2(sink - top)
    return tl.where(total > 0, 1.0, 0.0), tl.where(total > 0, total, 1.0)


@triton.jit
def store(
    highest, total, weighted, token, head, is_row,
    out, parts, part_lse, sinks, num_heads, num_parts, part,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows into `out`, or, if there are several parts per row, into part number `part`.

    out       [T, Hq, HEAD_DIM]; sinks [Hq] fp32 or None count here
    parts     [T, Hq, num_parts, HEAD_DIM] fp32, or None
    part_lse  [T, Hq, num_parts] fp32: log2 of a part's sum of 2^score; -inf if it saw no key, and
              then the part itself is not written
    """
    entry = tl.arange(0, BLOCK_D)
    row = token.to(tl.int64) * num_heads + head
    mask = is_row[:, None] & (entry < HEAD_DIM)[None, :]
    if parts is None:
        sink = highest
        if sinks is not None:
            sink = tl.load(sinks + head, mask=is_row, other=0.0) * LOG2E
        factor, divisor = finish(highest, total, sink, sinks is not None)
        result = weighted * (factor / divisor)[:, None]
        where = (row * HEAD_DIM)[:, None] + entry[None, :]
        tl.store(out + where, result.to(out.dtype.element_ty), mask=mask)
    else:
        sees_keys = total > 0
        divisor = tl.where(sees_keys, total, 1.0)
        lse = tl.where(sees_keys, highest + tl.log2(divisor), float("-inf"))
        slot = row * num_parts + part
        tl.store(part_lse + slot, lse, mask=is_row)
        where = (slot * HEAD_DIM)[:, None] + entry[None, :]
        tl.store(parts + where, weighted / divisor[:, None], mask=mask & sees_keys[:, None])
