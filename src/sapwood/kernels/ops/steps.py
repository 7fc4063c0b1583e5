"""Whole steps: what a device captures, and what kernels run in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import CapturedSharing
from sapwood.kernels.low_rank import AdapterRoom, CapturedAdapters
from sapwood.kernels.recording import Program, RecordedStep


class StepOps(Protocol):
    """See `Kernels` (kernels/interface.py) for what the letters of the shapes stand for."""

    def captured_sharing(
        self, num_requests: int, page_size: int, device: torch.device
    ) -> CapturedSharing | None:
        """For a captured decode of so many requests; None if attention shares no pages in one."""
        ...

    def captured_adapters(
        self, room: AdapterRoom, dtype: torch.dtype, device: torch.device
    ) -> CapturedAdapters | None:
        """For captured steps with activations of `dtype`; None: such steps have no adapters."""
        ...

    def record(
        self,
        program: Program,
        kv_caches: Sequence[tuple[Tensor, ...]],
        group_of_layer: Sequence[int] = (),
    ) -> RecordedStep:
        """The whole step of a decoder as one call.

        kv_caches       per layer: keys and values, or states
        group_of_layer  per layer the index of its cache group, which has pages of its own; empty:
                        all layers are of one group

        Raises CannotRecord if these kernels have no such call for it."""
        ...
