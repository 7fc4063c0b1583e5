"""Attention of a picture's tokens, which see one another in both directions.

Attention in a decoder is causal. Where a prompt shows a picture to Gemma 3, its rows are computed
again here, from the same pages: each sees what came before the picture, as far as the layer's
window reaches, and all of the picture. Such rows are few, and in prompts only.

Source: Gemma Team 2025, arXiv:2503.19786."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch, AttentionTraits, SeenBothWays


def attend_both_ways(
    out: Tensor,
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    traits: AttentionTraits,
) -> None:
    """Put the rows of `batch.both_ways` into `out`, which has what causal attention gives.

    out, q       [T, Hq, D]
    key_cache, value_cache  [num_pages, Hk, page_size, D], of q's dtype
    """
    for span in batch.both_ways:
        rows = out[span.start : span.end]
        rows.copy_(
            _attended(
                q[span.start : span.end], key_cache, value_cache, batch, span, scale, traits
            ).view_as(rows)
        )


def _attended(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    span: SeenBothWays,
    scale: float,
    traits: AttentionTraits,
) -> Tensor:
    page_size = key_cache.shape[2]
    last = span.first + span.end - span.start
    lowest = 0 if traits.window is None else max(0, span.first - traits.window + 1)
    at = torch.arange(lowest, last, device=q.device)
    pages = batch.page_table[span.request].long()[at // page_size]
    keys, values = (
        cache[pages, :, at % page_size].transpose(0, 1) for cache in (key_cache, value_cache)
    )
    num_tokens, num_heads, head_dim = q.shape
    grouped = q.transpose(0, 1).reshape(len(keys), -1, head_dim)
    scores = (grouped.float() @ keys.float().transpose(1, 2)) * scale
    if traits.soft_cap is not None:
        scores = traits.soft_cap * torch.tanh(scores / traits.soft_cap)
    if traits.window is not None:
        own = torch.arange(span.first, last, device=q.device)[:, None]
        unseen = (own - at >= traits.window).repeat(num_heads // len(keys), 1)
        scores = scores.masked_fill(unseen, -torch.inf)
    mixed = scores.softmax(-1) @ values.float()
    return mixed.view(num_heads, num_tokens, -1).transpose(0, 1).to(q.dtype)
