"""Texts of a step whose tokens attend to all tokens of their text, grouped by length.

The texts of a step lie one after the other. Those of equal length are computed together, as one
batch without padding; a length that occurs once is a batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
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
