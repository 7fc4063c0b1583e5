"""Latent attention in torch: see kernels/interface.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels import kv_cache
from sapwood.kernels.kv_cache import is_8_bit


class HeadProducts:
    """A linear layer of each head."""

    def __init__(self, weight: Tensor) -> None:
        """weight [H, out, in]"""
        self._weight = weight.transpose(1, 2).contiguous()

    def __call__(self, x: Tensor, out: Tensor) -> None:
        product = torch.bmm(x.transpose(0, 1), self._weight)
        out.copy_(product.transpose(0, 1))


def norm_rope_write_latent(
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
    rank = norm.shape[0]
    rope_dim = latent.shape[1] - rank
    table = cos_sin.index_select(0, positions)
    rotated_q = q[..., q.shape[-1] - rope_dim :]
    rotated_q.copy_(rotated(rotated_q, table))
    normed = F.rms_norm(latent[:, :rank].float(), (rank,), norm.float(), eps)
    key = rotated(latent[:, None, rank:], table)[:, 0]
    write_rows(cache, write_index, torch.cat((normed.to(q.dtype), key.to(q.dtype)), dim=-1))


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """x [T, H, D] in fp32, the first entries of each head rotated, halves paired; table [T, R]: the
    rows of cos_sin."""
    width = table.shape[1]
    cos, sin = table[:, None].chunk(2, dim=-1)
    first, second = x[..., :width].float().chunk(2, dim=-1)
    parts = (first * cos - second * sin, second * cos + first * sin, x[..., width:].float())
    return torch.cat(parts, dim=-1)


def write_rows(cache: Tensor, write_index: Tensor, rows: Tensor) -> None:
    """rows [T, D] into a cache [pages, 1, page_size, D], or in 8 bits, at write_index [T]."""
    if is_8_bit(cache.dtype):
        kv_cache.write(cache, write_index, rows.unsqueeze(1))
        return
    page_size = cache.shape[2]
    cache[:, 0].index_put_((write_index // page_size, write_index % page_size), rows)


def read_rows(cache: Tensor, pages: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The rows of pages [n] of a cache [pages, 1, page_size, width], or in 8 bits, one page after
    another: [n * page_size, width] of `dtype`."""
    if is_8_bit(cache.dtype):
        found = kv_cache.dequantize_pages(cache, pages, width, dtype)
    else:
        found = cache[pages].to(dtype)
    return found.view(-1, width)
