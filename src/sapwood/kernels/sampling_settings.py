"""The settings by which kernels sample tokens from rows of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """The settings of each row of a step's logits.

    The probabilities are softmax(logits / temperature). The filters apply in the order top-k,
    top-p, min-p, each to the tokens that the filter before kept.

    temperature  > 0
    top_k        keep that many of the likeliest; -1: all
    top_p        keep the likeliest until they have this share of the probability that top-k kept
    min_p        drop tokens that are less likely than this times the likeliest
    numbers      in [0, 1): the place in the kept distribution, whose order the kernels choose
    """

    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]
    numbers: Sequence[float]

    def __len__(self) -> int:
        return len(self.numbers)

    def table(self) -> NDArray[np.float64]:
        """[5, rows]: temperature, top_k, top_p, min_p and numbers, for a device."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.numbers)
        return np.array(columns, dtype=np.float64)

    @staticmethod
    def of_table(table: NDArray[np.float64]) -> SamplingSettings:
        temperature, top_k, top_p, min_p, numbers = table.tolist()
        return SamplingSettings(
            temperature=temperature,
            top_k=[int(k) for k in top_k],
            top_p=top_p,
            min_p=min_p,
            numbers=numbers,
        )
