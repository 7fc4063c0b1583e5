"""Attention of every token to all tokens of its text, without pages and without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.texts import EqualTexts


def bidirectional_attention(
    q: Tensor, k: Tensor, v: Tensor, texts: Sequence[EqualTexts], scale: float
) -> Tensor:
    """As Kernels.bidirectional_attention."""
    num_heads, head_dim = q.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group in texts:

        def of_group(x: Tensor, group: EqualTexts = group) -> Tensor:
            own = x if group.rows is None else x.index_select(0, group.rows)
            return own.reshape(-1, group.length, num_heads, head_dim).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(of_group(q), of_group(k), of_group(v), scale=scale)
        mixed = mixed.transpose(1, 2).reshape(-1, num_heads, head_dim)
        if group.rows is None:
            return mixed
        out.index_copy_(0, group.rows, mixed)
    return out
