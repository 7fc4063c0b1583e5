"""Latent attention in torch: see kernels/interface.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels import kv_cache
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.kv_cache import is_8_bit

_NUMBERS_AT_ONCE = 1 << 24
"""Of scores, or of gathered rows: 64 MiB in fp32."""


class HeadProducts:
    """A linear layer of each head."""

    def __init__(self, weight: Tensor) -> None:
        """weight [H, out, in]"""
        self._weight = weight.transpose(1, 2).contiguous()

    def __call__(self, x: Tensor, out: Tensor) -> None:
        _, num_in, num_out = self._weight.shape
        product = torch.bmm(x[..., :num_in].transpose(0, 1), self._weight)
        out[..., :num_out].copy_(product.transpose(0, 1))
        out[..., num_out:].copy_(x[..., num_in:])


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


def choose_keys(
    q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
) -> Tensor:
    found = torch.full((q.shape[0], num_chosen), -1, dtype=torch.int64, device=q.device)
    for rows, pages, length in _requests(batch, cache.shape[2]):
        keys = read_rows(cache, pages, q.shape[-1], q.dtype)[:length]
        at_once = max(1, _NUMBERS_AT_ONCE // (q.shape[1] * length))
        count = min(num_chosen, length)
        for first in range(rows.start, rows.stop, at_once):
            own = slice(first, min(first + at_once, rows.stop))
            scores = torch.einsum("thd,kd->thk", q[own].float(), keys.float()).relu_()
            total = torch.einsum("thk,th->tk", scores, weights[own])
            key = torch.arange(length, device=q.device)
            last = length - rows.stop + torch.arange(own.start, own.stop, device=q.device)
            hidden = key > last.unsqueeze(1)
            best = total.masked_fill_(hidden, -torch.inf).topk(count, dim=1).indices
            # Those that are not seen come last, and are none.
            best = best.masked_fill_(best > last.unsqueeze(1), length).sort(dim=1).values
            found[own, :count] = best.masked_fill_(best == length, -1)
    return found


def sparse_latent_attention(
    q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, rank: int, chosen: Tensor
) -> Tensor:
    out = q.new_empty(q.shape[0], q.shape[1], rank)
    width = q.shape[-1]
    for rows, pages, length in _requests(batch, cache.shape[2]):
        all_keys = read_rows(cache, pages, width, q.dtype)[:length]
        at_once = max(1, _NUMBERS_AT_ONCE // (chosen.shape[1] * max(width, q.shape[1])))
        for first in range(rows.start, rows.stop, at_once):
            own = slice(first, min(first + at_once, rows.stop))
            keys = all_keys[chosen[own].clamp(min=0)]  # [t, chosen, width]
            scores = torch.bmm(q[own], keys.transpose(1, 2)).float().mul_(scale)
            scores.masked_fill_((chosen[own] < 0).unsqueeze(1), -torch.inf)
            out[own] = torch.bmm(scores.softmax(dim=-1).to(q.dtype), keys[..., :rank])
    return out


def _requests(batch: AttentionBatch, page_size: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Of each request (rows of its new tokens, its pages, its length)."""
    start = 0
    for index, (num_new, length) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        pages = batch.page_table[index, : -(-length // page_size)].long()
        yield slice(start, start + num_new), pages, length
        start += num_new
