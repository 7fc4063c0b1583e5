"""Copies, gates and gated norms of rows, and the soft cap of logits, with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.state_forms import GatedNormForm


def copy_rows(tensor: Tensor, source: Tensor, target: Tensor) -> None:
    """As Kernels.copy_rows. The rows that are read are copied once more on the way."""
    if source.shape != target.shape:
        raise ValueError(f"{len(source)} rows to read, but {len(target)} to write")
    # Some ops do not know the dtypes of 8-bit caches.
    rows = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    rows.index_copy_(0, target, rows.index_select(0, source))


def carry_rows(
    source: Tensor, target: Tensor, from_rows: Sequence[int], to_rows: Sequence[int]
) -> None:
    """As Kernels.carry_rows."""
    for read, written in zip(from_rows, to_rows, strict=True):
        target[written].copy_(source[read], non_blocking=True)


def gate_rows(x: Tensor, gate: Tensor) -> None:
    """As Kernels.gate_rows, and as Kernels.gate_columns."""
    x.copy_(x.float() * torch.sigmoid(gate.float()))


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm) -> Tensor:
    """As Kernels.gated_rms_norm."""
    if x.shape[1] % form.group:
        raise ValueError(f"{x.shape[1]} columns are no groups of {form.group}")
    wide, gates = x.float().contiguous(), gate.float()
    factor = torch.sigmoid(gates) if form.logistic else F.silu(gates)
    if not form.norm_first:
        wide = wide * factor
    groups = wide.view(x.shape[0], -1, form.group)
    normed = groups * torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + form.eps)
    out = normed.view(x.shape) * weight.float()
    return (out * factor if form.norm_first else out).to(x.dtype)


def soft_cap(logits: Tensor, cap: float) -> None:
    """As Kernels.soft_cap."""
    logits.div_(cap).tanh_().mul_(cap)
