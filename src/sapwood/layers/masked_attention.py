"""Attention of texts of equal length, with what encoders of prompts add to its scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    added: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """q [B, L, H, D], k and v [B, M, H, D] -> [B, L, H * D]

    added      [B or 1, H or 1, L, M]: added to the scores; None: nothing
    is_causal  whether a token attends to itself and those before it alone
    """
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=added,
        is_causal=is_causal,
        scale=scale,
    )
    return mixed.transpose(1, 2).flatten(2)
