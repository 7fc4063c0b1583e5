"""Latent and sparse attention in C++, and what the compiled module takes of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.tensors import (
    CacheLayout,
    address_of,
    cache_layout,
    check_indices,
    describe,
    dtype_of,
    table_of,
)
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.kernels.torch_ops import latent as torch_latent

_TORCH = TorchKernels()
_PLACES = "places of chosen keys"
Form = tuple[int, int, int, int, int, float, int, int, int]
Rows = tuple[int, int, int, int, int]
Shape = tuple[int, int, int, int, int]


def has_rows(row: int, rank: int) -> bool:
    """Whether the compiled module has latent rows of these sizes; torch computes the others."""
    step = _native.HEAD_DIM_STEP
    return row % step == 0 and rank % step == 0 and row <= _native.MAX_HEAD_DIM


def latent_tuple(
    num_heads: int,
    key_dim: int,
    row: int,
    norm: Tensor,
    eps: float,
    cos_sin: Tensor,
    like: Tensor,
) -> Form:
    """The heads of a layer; ValueError if norm and cos_sin do not fit them."""
    rank = norm.numel()
    if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError("cos_sin must be float32 and contiguous")
    max_positions, rotary_dim = cos_sin.shape
    if rotary_dim > row - rank or rotary_dim % 2 or key_dim < row - rank:
        raise ValueError(
            f"rotary_dim {rotary_dim} must be even and at most {row - rank}, and queries of "
            f"{key_dim} entries at least as long"
        )
    address = address_of(norm, like, rank, "norm")
    return (
        num_heads,
        key_dim,
        rank,
        row,
        address,
        eps,
        cos_sin.data_ptr(),
        max_positions,
        rotary_dim,
    )


def rows_tuple(cache: Tensor, like: Tensor, row: int) -> Rows:
    layout = cache_layout(cache, cache, like, 1, row)
    return (cache.data_ptr(), layout.key_stride, layout.kv, layout.num_pages, layout.page_size)


def norm_rope_write_latent(
    context: _native.Context,
    q: Tensor,
    latent: Tensor,
    *,
    norm: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    write_index: Tensor,
) -> None:
    """As Kernels.norm_rope_write_latent."""
    num_tokens, num_heads, key_dim = q.shape
    row, rank = latent.shape[1], norm.shape[0]
    if not has_rows(row, rank):
        torch_latent.norm_rope_write_latent(
            q, latent, norm=norm, eps=eps, cos_sin=cos_sin, positions=positions, cache=cache,
            write_index=write_index,
        )  # fmt: skip
        return
    if not q.is_contiguous() or latent.shape[0] != num_tokens or latent.dtype != q.dtype:
        raise ValueError(
            f"q {describe(q)} must be contiguous, with a row of {describe(latent)} each"
        )
    if latent.stride(1) != 1:
        latent = latent.contiguous()
    check_indices(positions, "positions", num_tokens)
    check_indices(write_index, "write_index", num_tokens)
    _native.norm_rope_write_latent(
        context, dtype_of(q), q.data_ptr(), latent.data_ptr(), latent.stride(0), num_tokens,
        latent_tuple(num_heads, key_dim, row, norm, eps, cos_sin, q), positions.data_ptr(),
        write_index.data_ptr(), rows_tuple(cache, q, row),
    )  # fmt: skip


def latent_attention(
    context: _native.Context,
    make_plan: Callable[[AttentionBatch, Shape], _native.AttentionPlan],
    q: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    rank: int,
) -> Tensor:
    """As Kernels.latent_attention; make_plan: CpuKernels.plan"""
    num_tokens, num_heads, row = q.shape
    if not has_rows(row, rank):
        return _TORCH.latent_attention(q, cache, batch, scale, rank)
    layout = cache_layout(cache, cache, q, 1, row)
    plan = make_plan(batch, (num_heads, 1, row, layout.page_size, layout.num_pages))
    if plan.num_tokens != num_tokens:
        raise ValueError(
            f"q has {num_tokens} tokens but the batch's query lengths add up to {plan.num_tokens}"
        )
    return _attend(context, plan, q, cache, layout, scale, rank, 0)


def choose_keys(
    context: _native.Context,
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    num_chosen: int,
) -> Tensor:
    """As Kernels.choose_keys; of keys with the same score the earlier ones."""
    num_tokens, num_heads, head_dim = q.shape
    if head_dim % _native.HEAD_DIM_STEP:
        return torch_latent.choose_keys(q, weights, cache, batch, num_chosen)
    if weights.shape != (num_tokens, num_heads) or weights.dtype != torch.float32:
        raise ValueError(f"weights {describe(weights)} do not fit q {describe(q)}")
    if sum(batch.query_lens) != num_tokens:
        raise ValueError(f"q {describe(q)} does not fit {sum(batch.query_lens)} new tokens")
    q, weights = q.contiguous(), weights.contiguous()
    out = torch.empty((num_tokens, num_chosen), dtype=torch.int64)
    _native.choose_keys(
        context, dtype_of(q), q.data_ptr(), weights.data_ptr(), num_heads, head_dim,
        rows_tuple(cache, q, head_dim), table_of(batch), batch.query_lens, batch.context_lens,
        num_chosen, out.data_ptr(),
    )  # fmt: skip
    return out


def sparse_latent_attention(
    context: _native.Context,
    q: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    rank: int,
    chosen: Tensor,
) -> Tensor:
    """As Kernels.sparse_latent_attention: each token is a request of its own to the attention that
    every model has, and a page of this request is a single key."""
    num_tokens, num_heads, row = q.shape
    if not has_rows(row, rank):
        return torch_latent.sparse_latent_attention(q, cache, batch, scale, rank, chosen)
    layout = cache_layout(cache, cache, q, 1, row)
    if sum(batch.query_lens) != num_tokens or chosen.shape[0] != num_tokens:
        raise ValueError(
            f"q {describe(q)} and chosen {describe(chosen)} do not fit "
            f"{sum(batch.query_lens)} new tokens"
        )
    shape = (num_heads, row, layout.page_size, layout.num_pages)
    plan = _plan_of(context, chosen, shape, batch)
    return _attend(context, plan, q, cache, layout, scale, rank, layout.page_size)


def _attend(
    context: _native.Context,
    plan: _native.AttentionPlan,
    q: Tensor,
    cache: Tensor,
    layout: CacheLayout,
    scale: float,
    rank: int,
    page_size: int,
) -> Tensor:
    """page_size: of the cache, if the plan's pages are single tokens of it; else 0"""
    num_tokens, num_heads, row = q.shape
    q = q.contiguous()
    out = q.new_empty((num_tokens, num_heads, rank))
    plan.run(
        context, dtype_of(q), q.data_ptr(), num_heads * row, cache.data_ptr(), layout.key_stride,
        cache.data_ptr(), layout.value_stride, layout.kv, out.data_ptr(), scale, 0, 0.0, 0, 0,
        rank, page_size,
    )  # fmt: skip
    return out


def _plan_of(
    context: _native.Context,
    chosen: Tensor,
    shape: tuple[int, int, int, int],
    batch: AttentionBatch,
) -> _native.AttentionPlan:
    """Of attention to chosen keys; layers that take the same choice share it.

    shape  (query heads, entries of a row, page size, pages of the cache)"""
    kept = batch.cache.get(_PLACES)
    if kept is not None and kept[0] is chosen and kept[1] == shape:
        return cast("_native.AttentionPlan", kept[3])
    num_heads, row, page_size, num_pages = shape
    places = _places_of(chosen, batch, page_size)
    num_chosen = chosen.shape[1]
    plan = _native.AttentionPlan(
        context, num_heads, 1, row, 1, num_pages * page_size, places.data_ptr(), num_chosen,
        num_chosen, [1] * len(chosen), (chosen >= 0).sum(dim=1).tolist(), [], 0,
    )  # fmt: skip
    batch.cache[_PLACES] = (chosen, shape, places, plan)  # the plan reads the places
    return plan


def _places_of(chosen: Tensor, batch: AttentionBatch, page_size: int) -> Tensor:
    """[T, num_chosen] int32: page * page_size + offset of each chosen key; of none that of the
    request's first."""
    table = batch.page_table.contiguous()
    query_lens = torch.tensor(batch.query_lens)
    request = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    key = chosen.clamp(min=0)
    page = torch.take(table, key // page_size + (request * table.shape[1]).unsqueeze(1))
    return page * page_size + (key % page_size).int()
