"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sapwood.kernels.sampling_settings import SamplingSettings


class SamplingOps(Protocol):
    """See `Kernels` (kernels/interface.py) for what the letters of the shapes stand for."""

    def argmax(self, logits: Tensor) -> Tensor:
        """logits [S, vocab] -> [S] int64: each row's largest entry, the first of equal ones."""
        ...

    def mask_logits(self, logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
        """logits[rows[i], t] becomes -inf, in place, where bit t % 32 of masks[i, t // 32] is 0.

        logits  [S, vocab] of a float dtype
        masks   [n, ceil(vocab / 32)] int32 on the host, contiguous; bits beyond vocab are ignored
        rows    n different rows of logits
        """
        ...

    def soft_cap(self, logits: Tensor, cap: float) -> None:
        """logits [S, vocab] fp32 become cap * tanh(logits / cap), in place.
        Source: Gemma Team 2024, arXiv:2408.00118."""
        ...

    def penalise(
        self,
        logits: Tensor,
        ids: Tensor,
        counts: Tensor,
        *,
        repetition: float,
        frequency: float,
        presence: float,
    ) -> None:
        """Change logits[ids], in place, as their tokens were seen: those above 0 are divided by
        `repetition` and the others multiplied by it; then frequency * count is subtracted, and
        `presence` where the count is above 0.

        logits  [vocab] of one row, of a float dtype
        ids     [n] int64, different ones
        counts  [n] fp32: how often each is in the output
        Source of the repetition penalty: Keskar et al. 2019, arXiv:1909.05858."""
        ...

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor:
        """logits [S, vocab] -> [S] int64: one token of each row at random, by its `settings`.

        A row's token depends on that row alone."""
        ...

    def sample_with(self, logits: Tensor, table: Tensor) -> Tensor:
        """As `sample`, by `SamplingSettings.table` [5, S] fp64 on the device of the logits, where
        kernels that `can_be_captured` leave it."""
        ...
