"""Attention of every token to all tokens of its text, without pages and without padding.

The texts of a step lie one after the other. Those of equal length are computed together, as one
batch without padding; a length that occurs once is a batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EqualTexts:
    """Texts of equal length.

    length  tokens of each text
    rows    [texts * length] int64: the texts' tokens among the tokens of the step, text by text;
            None: the step has no other texts
    """

    length: int
    rows: Tensor | None


def group_texts(lengths: Sequence[int], device: torch.device) -> list[EqualTexts]:
    """The step's texts by length; made once per step, used by every layer."""
    by_length: dict[int, list[int]] = {}
    for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        by_length.setdefault(length, []).append(start)
    if len(by_length) == 1:
        return [EqualTexts(lengths[0], None)]
    return [
        EqualTexts(
            length,
            (torch.tensor(starts)[:, None] + torch.arange(length)).view(-1).to(device),
        )
        for length, starts in by_length.items()
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, texts: Sequence[EqualTexts], scale: float) -> Tensor:
    """q, k, v [T, heads, head_dim] of all texts -> [T, heads * head_dim]."""
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    for group in texts:

        def of_group(x: Tensor, group: EqualTexts = group) -> Tensor:
            own = x if group.rows is None else x.index_select(0, group.rows)
            return own.reshape(-1, group.length, num_heads, head_dim).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(of_group(q), of_group(k), of_group(v), scale=scale)
        mixed = mixed.transpose(1, 2).reshape(-1, num_heads * head_dim)
        if group.rows is None:
            return mixed
        out.index_copy_(0, group.rows, mixed)
    return out
