"""How tokens are drawn from rows of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """One entry per row. The probabilities are softmax(logits / temperature); the filters apply in
    the order top-k, top-p, min-p, each to what the one before kept.

    temperature  > 0
    top_k        keep that many of the likeliest; -1: all
    top_p        keep the likeliest while those before have less than this share of what top-k kept
    min_p        drop what is less likely than this times the likeliest
    numbers      in [0, 1): where in the distribution of what is kept; its order is the kernels' own
    """

    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]
    numbers: Sequence[float]

    def __len__(self) -> int:
        return len(self.numbers)
