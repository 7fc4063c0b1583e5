"""The choice of keys by an indexer on a GPU: the scores of all keys, then the best of each token.

Scores are kept for some tokens at once. Of a token's scores the smallest that is chosen is found
digit by digit, from the highest digit down, in numbers that sort as the scores do; then the chosen
keys are written in their order. Of equal ones the first are chosen. The sizes of a batch are read
on the device.

Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.triton.attention_core import dequantized, dot, load_queries
from sapwood.kernels.triton.attention_sizes import next_power_of_2
from sapwood.kernels.triton.kv_format import KV_NAMES
from sapwood.kernels.triton.latent import checked_parts, rows_of

_SCORES_AT_ONCE = 1 << 26
"""256 MiB."""
_KEYS = 512
"""Of one program that computes scores."""
_BLOCK = 1024
"""Scores that are looked at together."""


@triton.jit(do_not_specialize=["page_table_stride", "first_token", "width"])
def _index_scores(
    q, weights, cache, scales, page_table, request_of, num_seen, scores,
    q_token_stride, q_head_stride, page_table_stride, page_stride, token_stride,
    num_heads, first_token, width,
    DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KV: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the keys, tokens); scores [tokens, width] fp32. Keys that a token does not see
    have none."""
    token = first_token + tl.program_id(1)
    end = tl.minimum(tl.load(num_seen + token), (tl.program_id(0) + 1) * KEYS)
    pages = page_table + tl.load(request_of + token).to(tl.int64) * page_table_stride
    entry, row = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    tokens = tl.zeros([BLOCK_M], tl.int32) + token
    out = scores + tl.program_id(1).to(tl.int64) * width
    for begin in range(tl.program_id(0) * KEYS, end, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        exists = key < end
        page = tl.load(pages + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        offset = key % PAGE_SIZE
        at = (cache + page * page_stride + offset * token_stride)[:, None] + entry[None, :]
        keys = tl.load(at, mask=exists[:, None] & (entry < DIM)[None, :], other=0)
        if KV != "":
            keys = dequantized(
                keys, scales, page, offset, page_stride, exists, q.dtype.element_ty, KV, True
            )
        total = tl.zeros([BLOCK_N], tl.float32)
        for first_head in range(0, num_heads, BLOCK_M):
            head = first_head + row
            is_head = head < num_heads
            query = load_queries(
                q, tokens, head, is_head, q_token_stride, q_head_stride, DIM, BLOCK_D
            )
            weight = tl.load(weights + token * num_heads + head, mask=is_head, other=0.0)
            score = dot(query, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            total += tl.sum(tl.maximum(score, 0.0) * weight[:, None], 0)
        tl.store(out + key, total, mask=exists)


@triton.jit
def _sortable(score):
    """Whole numbers from 0 to 2**32 - 1, as int64, that sort as the scores do."""
    # + 0: of two zeros none is smaller.
    bits = (score + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 0x80000000)


@triton.jit(do_not_specialize=["first_token", "width"])
def _choose_keys(
    scores, num_seen, chosen, num_chosen, first_token, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (tokens,); chosen [T, num_chosen] int64."""
    token = first_token + tl.program_id(0)
    end = tl.load(num_seen + token)
    scores += tl.program_id(0).to(tl.int64) * width
    out = chosen + token.to(tl.int64) * num_chosen
    place, digits = tl.arange(0, BLOCK), tl.arange(0, 256)
    # Of the smallest chosen score: the digits that are known, and how many keys are yet to be found
    # among those that have the same ones.
    known, wanted = tl.zeros([1], tl.int64), tl.zeros([1], tl.int64) + num_chosen
    if end > num_chosen:
        for digit in tl.static_range(4):
            shift = 24 - 8 * digit
            counts = tl.zeros([256], tl.int32)
            for begin in range(0, end, BLOCK):
                exists = begin + place < end
                number = _sortable(tl.load(scores + begin + place, mask=exists, other=0.0))
                is_alike = exists & ((number >> (shift + 8)) == known)
                counts += tl.histogram(((number >> shift) & 255).to(tl.int32), 256, mask=is_alike)
            at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
            best = tl.max(tl.where(at_least >= wanted, digits, 0), 0)
            wanted -= tl.sum(tl.where(digits > best, counts, 0), 0)
            known = known * 256 + best
    num_written, num_alike = tl.zeros([1], tl.int64), tl.zeros([1], tl.int64)
    for begin in range(0, end, BLOCK):
        exists = begin + place < end
        number = _sortable(tl.load(scores + begin + place, mask=exists, other=0.0))
        is_alike = exists & (number == known)
        alike = is_alike.to(tl.int64)
        is_first = num_alike + tl.cumsum(alike, 0) <= wanted
        is_chosen = (exists & (number > known)) | (is_alike & is_first)
        if end <= num_chosen:
            is_chosen = exists
        counted = is_chosen.to(tl.int64)
        to = num_written + tl.cumsum(counted, 0) - 1
        tl.store(out + to, (begin + place).to(tl.int64), mask=is_chosen)
        num_written += tl.sum(counted, 0)
        num_alike += tl.sum(alike, 0)
    for begin in range(0, num_chosen, BLOCK):
        to = begin + place
        nothing = tl.zeros([BLOCK], tl.int64) - 1
        tl.store(out + to, nothing, mask=(to >= end) & (to < num_chosen))


def choose_keys(
    q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
) -> Tensor:
    """As Kernels.choose_keys, for any page size and head size. Of equal keys it chooses the first
    ones."""
    num_tokens, num_heads, dim = q.shape
    page_size = cache.shape[2]
    rows, scales = checked_parts(cache, q)
    q = q if q.stride(2) == 1 else q.contiguous()
    weights = weights.float().contiguous()
    request_of, num_seen = rows_of(batch, num_tokens)
    width = batch.page_table.shape[1] * page_size
    chosen = torch.empty((num_tokens, num_chosen), dtype=torch.int64, device=q.device)
    at_once = min(num_tokens, max(1, _SCORES_AT_ONCE // width))
    scores = torch.empty((at_once, width), dtype=torch.float32, device=q.device)
    block_m = min(64, max(16, next_power_of_2(num_heads)))
    for first in range(0, num_tokens, at_once):
        count = min(at_once, num_tokens - first)
        _index_scores[(triton.cdiv(width, _KEYS), count)](
            q, weights, rows, scales, batch.page_table, request_of, num_seen, scores,
            *q.stride()[:2], batch.page_table.stride(0), rows.stride(0), rows.stride(2),
            num_heads, first, width,
            DIM=dim, PAGE_SIZE=page_size, KV=KV_NAMES.get(cache.dtype, ""), KEYS=_KEYS,
            BLOCK_M=block_m, BLOCK_N=32 if q.dtype == torch.float32 else 64,
            BLOCK_D=max(16, next_power_of_2(dim)),
        )  # fmt: skip
        _choose_keys[(count,)](
            scores, num_seen, chosen, num_chosen, first, width, BLOCK=_BLOCK, num_warps=8
        )
    return chosen
