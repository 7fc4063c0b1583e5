"""The ops of latent attention in C++, and what the compiled module takes of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.tensors import (
    address_of,
    cache_layout,
    check_indices,
    describe,
    dtype_of,
)
from sapwood.kernels.torch_ops import latent as torch_latent

Form = tuple[int, int, int, int, int, float, int, int, int]
Rows = tuple[int, int, int, int, int]


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
