"""Penalties on the logits of tokens that a request has seen, with torch."""

from __future__ import annotations

import torch
from torch import Tensor


def penalise(
    logits: Tensor,
    ids: Tensor,
    counts: Tensor,
    *,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """As Kernels.penalise."""
    seen = logits[ids]
    if repetition != 1.0:
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    logits[ids] = seen - frequency * counts - presence * (counts > 0)
