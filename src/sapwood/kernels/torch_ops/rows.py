"""Copies of rows, and the soft cap of logits, with torch."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_rows(tensor: Tensor, source: Tensor, target: Tensor) -> None:
    """As Kernels.copy_rows. The rows that are read are copied once more on the way."""
    if source.shape != target.shape:
        raise ValueError(f"{len(source)} rows to read, but {len(target)} to write")
    # Some ops do not know the dtypes of 8-bit caches.
    rows = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    rows.index_copy_(0, target, rows.index_select(0, source))


def gate_rows(x: Tensor, gate: Tensor) -> None:
    """As Kernels.gate_rows."""
    x.copy_(x.float() * torch.sigmoid(gate.float()))


def soft_cap(logits: Tensor, cap: float) -> None:
    """As Kernels.soft_cap."""
    logits.div_(cap).tanh_().mul_(cap)
