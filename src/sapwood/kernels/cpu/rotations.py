"""Norms and rotations of heads beside the ones that write a cache: checks, then a call into C++."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.tensors import address_of, describe, dtype_of


def norm_rotate_heads(
    context: _native.Context,
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    rotations: Tensor | None,
    out: Tensor,
) -> None:
    """As Kernels.norm_rotate_heads; rows of x may lie apart."""
    rows, num_heads, head_dim = out.shape
    if x.shape != (rows, num_heads * head_dim) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"x {describe(x)} does not fit {describe(out)}, or that has gaps")
    if x.stride(1) != 1:
        x = x.contiguous()
    turned = 0
    if rotations is not None:
        if rotations.shape != (rows, head_dim // 2) or rotations.dtype != torch.complex64:
            raise ValueError(f"rotations {describe(rotations)} do not fit {describe(out)}")
        rotations = rotations.contiguous()
        turned = rotations.data_ptr()
    _native.norm_rotate_heads(
        context, dtype_of(x), x.data_ptr(), x.stride(0), address_of(norm, x, head_dim, "norm"),
        eps, turned, out.data_ptr(), rows, num_heads, head_dim,
    )  # fmt: skip
