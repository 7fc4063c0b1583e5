"""Norms and rotations of heads, with torch."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rotate_heads(
    x: Tensor, norm: Tensor | None, eps: float, rotations: Tensor | None, out: Tensor
) -> None:
    """As Kernels.norm_rotate_heads."""
    heads = x.reshape(out.shape)
    if norm is not None:
        wide = heads.float()
        factor = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        heads = (wide * factor * norm.float()).to(x.dtype)
    if rotations is not None:
        pairs = torch.view_as_complex(heads.float().reshape(*heads.shape[:-1], -1, 2))
        heads = torch.view_as_real(pairs * rotations[:, None]).flatten(-2)
    out.copy_(heads)
