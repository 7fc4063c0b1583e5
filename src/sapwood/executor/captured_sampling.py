"""Choosing tokens from the logits of captured steps, in one call.

The choice is a capture of its own, because penalties and grammars may change a step's logits before
a token is chosen from them. The requests' sampling settings are in fixed memory, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.buckets import smallest_that_holds
from sapwood.executor.sampling.sampler import SamplingOps
from sapwood.kernels.capture import Capture, Replayable, capture
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.transfer import upload_one


class CapturableSamplingOps(SamplingOps, Protocol):
    """All ops of `Kernels` that choose tokens."""

    def sample_with(self, logits: Tensor, table: Tensor) -> Tensor: ...


class CapturedSampling:
    """SamplingOps that replay a capture if they can.

    They can if the logits are all the logits of a captured step; else they call the kernels' ops.

    logits  [most requests, vocab] fp32: the memory in which captured steps leave their logits
    sizes   numbers of requests, in ascending order
    """

    def __init__(self, ops: CapturableSamplingOps, logits: Tensor, sizes: Sequence[int]) -> None:
        most = logits.shape[0]
        self._ops = ops
        self._logits = logits
        self._sizes = sizes
        self._tables = torch.ones(5 * most, dtype=torch.float64, device=logits.device)
        self._chosen = torch.zeros(most, dtype=torch.int64, device=logits.device)
        self._greedy: dict[int, Replayable] = {}
        self._random: dict[int, Replayable] = {}

    def capture(self, size: int, recorder: Capture) -> None:
        """Capture the choice for `size` requests; the largest size comes first, for its memory."""
        logits, chosen = self._logits[:size], self._chosen[:size]
        table = self._table_of(size)
        table.copy_(upload_one(_filled([], size), np.float64, logits.device))

        def greedy() -> None:
            chosen.copy_(self._ops.argmax(logits))

        def random() -> None:
            chosen.copy_(self._ops.sample_with(logits, table))

        for work, captured in ((greedy, self._greedy), (random, self._random)):
            work()  # first uses compile and allocate, which a capture must not
            captured[size] = capture(recorder, work)

    def argmax(self, logits: Tensor) -> Tensor:
        size = self._size_of(logits)
        if size is None:
            return self._ops.argmax(logits)
        self._greedy[size].replay()
        return self._chosen[: len(logits)].clone()

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor:
        size = self._size_of(logits)
        if size is None:
            return self._ops.sample(logits, settings)
        filled = _filled([settings], size)
        self._table_of(size).copy_(upload_one(filled, np.float64, logits.device))
        self._random[size].replay()
        return self._chosen[: len(logits)].clone()

    def _table_of(self, size: int) -> Tensor:
        """The settings [5, size] of the first `size` requests, contiguous in memory."""
        return self._tables[: 5 * size].view(5, size)

    def _size_of(self, logits: Tensor) -> int | None:
        if logits.data_ptr() != self._logits.data_ptr():
            return None
        return smallest_that_holds(self._sizes, len(logits))


_NO_REQUEST = SamplingSettings(
    temperature=[1.0], top_k=[-1], top_p=[1.0], min_p=[0.0], numbers=[0.0]
)


def _filled(settings: Sequence[SamplingSettings], size: int) -> NDArray[np.float64]:
    """All settings as one table, padded to [5, size] with harmless settings."""
    missing = size - sum(len(rows) for rows in settings)
    return np.concatenate([rows.table() for rows in (*settings, *[_NO_REQUEST] * missing)], axis=1)
