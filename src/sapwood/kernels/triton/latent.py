"""Attention to latent rows on a GPU, to all of a token's or to chosen ones: each program has one
token, some of its heads, and a part of the rows, which it reads once for keys and values.

What is found for the parts is merged as in attention_merge. A row's latent and its rotated key are
two blocks, so that each is nearly a power of two. The sizes of a batch are read on the device.

Source: DeepSeek-AI 2024, arXiv:2405.04434; Dao et al. 2023 (Flash-Decoding).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.kv_cache import kv_cache_shape
from sapwood.kernels.triton.attention_core import (
    LOG2E,
    chunk_of_keys,
    dequantized,
    dot,
    load_queries,
    store,
)
from sapwood.kernels.triton.attention_merge import merge_kernel
from sapwood.kernels.triton.attention_sizes import DECODE, next_power_of_2
from sapwood.kernels.triton.kv_format import KV_NAMES, parted

_LEAST_ROWS, _MOST_ROWS = 16, 64
"""Heads of a program: of the smallest matrix product, and as many as registers hold."""


@triton.jit(do_not_specialize=["page_table_stride", "num_splits"])
def _latent_attention(
    q, cache, scales, page_table, request_of, num_seen, chosen, out, parts, part_lse, scale,
    q_token_stride, q_head_stride, page_table_stride, page_stride, token_stride,
    num_heads, num_splits, num_chosen,
    RANK: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (num_splits, blocks of heads, tokens); chosen [tokens, num_chosen] int64, or None."""
    split, block, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = head < num_heads
    tokens = tl.zeros([BLOCK_M], tl.int32) + token
    pages = page_table + tl.load(request_of + token).to(tl.int64) * page_table_stride
    end = tl.load(num_seen + token)
    if chosen is not None:
        end = tl.minimum(end, num_chosen)
        chosen += token.to(tl.int64) * num_chosen
    start, stop = chunk_of_keys(0, end, split, num_splits, MIN_CHUNK, BLOCK_N, PAGE_SIZE)
    latent_entry, rope_entry = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if start < stop:
        of_latents = load_queries(
            q, tokens, head, is_row, q_token_stride, q_head_stride, RANK, BLOCK_C
        )
        of_ropes = load_queries(
            q + RANK, tokens, head, is_row, q_token_stride, q_head_stride, ROPE, BLOCK_P
        )
        for begin in range(start, stop, BLOCK_N):
            key = begin + tl.arange(0, BLOCK_N)
            exists = key < stop
            if chosen is not None:
                key = tl.load(chosen + key, mask=exists, other=0)
                page = tl.load(pages + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
            elif PAGE_SIZE % BLOCK_N == 0:
                page = tl.load(pages + begin // PAGE_SIZE).to(tl.int64)
            else:
                page = tl.load(pages + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
            offset = key % PAGE_SIZE
            at = (cache + page * page_stride + offset * token_stride)[:, None]
            # What is masked out is not read either: it may be another request's, or NaN.
            latent = tl.load(
                at + latent_entry[None, :],
                mask=exists[:, None] & (latent_entry < RANK)[None, :],
                other=0,
            )
            rope = tl.load(
                at + RANK + rope_entry[None, :],
                mask=exists[:, None] & (rope_entry < ROPE)[None, :],
                other=0,
            )
            if KV != "":
                latent = dequantized(
                    latent, scales, page, offset, page_stride, exists, of_latents.dtype, KV, True
                )
                rope = dequantized(
                    rope, scales, page, offset, page_stride, exists, of_latents.dtype, KV, True
                )
            score = dot(of_latents, tl.trans(latent), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            score = dot(of_ropes, tl.trans(rope), score) * scale * LOG2E
            score = tl.where(exists[None, :], score, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])  # each row sees a key of each block
            rescale = tl.exp2(highest - higher)
            total = total * rescale + tl.sum(weight, 1)
            weighted = dot(weight.to(latent.dtype), latent, weighted * rescale[:, None])
            highest = higher
    store(
        highest, total, weighted, tokens, head, is_row,
        out, parts, part_lse, None, num_heads, num_splits, split,
        RANK, BLOCK_C,
    )  # fmt: skip


def checked_parts(cache: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `parted`; ValueError unless the cache has rows like those of q."""
    shape = kv_cache_shape(cache.shape[0], 1, cache.shape[2], q.shape[2], cache.dtype)
    if tuple(cache.shape) != tuple(shape) or cache.dtype not in (q.dtype, *KV_NAMES):
        raise ValueError(
            f"cache {list(cache.shape)} {cache.dtype} must be {list(shape)} of {q.dtype} or in "
            "8 bits"
        )
    return parted(cache, q.shape[2])


def latent_attention(
    q: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    rank: int,
    chosen: Tensor | None = None,
) -> Tensor:
    """As Kernels.latent_attention, for any page size and sizes of rows; with `chosen`, as
    Kernels.sparse_latent_attention."""
    num_tokens, num_heads, row = q.shape
    page_size = cache.shape[2]
    rows, scales = checked_parts(cache, q)
    q = q if q.stride(2) == 1 else q.contiguous()
    request_of, num_seen = rows_of(batch, num_tokens)
    block_m = min(_MOST_ROWS, max(_LEAST_ROWS, next_power_of_2(num_heads)))
    num_blocks = -(-num_heads // block_m)
    most_keys, num_chosen = batch.page_table.shape[1] * page_size, 0
    if chosen is not None:
        chosen, num_chosen = chosen.contiguous(), chosen.shape[1]
        most_keys = min(most_keys, num_chosen)
    num_splits = DECODE.num_splits(num_tokens * num_blocks, most_keys)
    out = q.new_empty(num_tokens, num_heads, rank)
    parts = lse = None
    if num_splits > 1:
        parts = out.new_empty((num_tokens, num_heads, num_splits, rank), dtype=torch.float32)
        lse = out.new_empty((num_tokens, num_heads, num_splits), dtype=torch.float32)
    block_c = max(16, next_power_of_2(rank))
    _latent_attention[(num_splits, num_blocks, num_tokens)](
        q, rows, scales, batch.page_table, request_of, num_seen, chosen, out, parts, lse, scale,
        *q.stride()[:2], batch.page_table.stride(0), rows.stride(0), rows.stride(2),
        num_heads, num_splits, num_chosen,
        RANK=rank, ROPE=row - rank, PAGE_SIZE=page_size, KV=KV_NAMES.get(cache.dtype, ""),
        BLOCK_M=block_m, BLOCK_N=16 if q.dtype == torch.float32 else 32, BLOCK_C=block_c,
        BLOCK_P=max(16, next_power_of_2(row - rank)), MIN_CHUNK=DECODE.min_chunk,
        num_warps=4 if block_m == _LEAST_ROWS else 8,
        num_stages=1 if q.dtype == torch.float32 else 3,
    )  # fmt: skip
    if parts is not None:
        merge_kernel[(num_tokens, num_heads)](
            parts, lse, None, out, num_heads, num_splits,
            HEAD_DIM=rank, BLOCK_D=block_c, BLOCK_P=16, num_warps=4,
        )  # fmt: skip
    return out


def rows_of(batch: AttentionBatch, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Per new token the index of its request, and how many keys the token sees; both int32. Not
    kept with the batch: what a graph has captured must be computed at each replay."""
    row = torch.arange(num_tokens, dtype=torch.int32, device=batch.query_start.device)
    request = torch.searchsorted(batch.query_start, row, right=True, out_int32=True) - 1
    following = batch.query_start[request + 1] - 1 - row
    return request, batch.context_len[request] - following
