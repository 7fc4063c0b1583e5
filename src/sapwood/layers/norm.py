"""RMS normalisation with a learned weight."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.interface import Kernels
from sapwood.layers.targets import Target, whole


class RMSNorm:
    """x / rms(x) * weight over the last dimension; every rank holds the whole weight."""

    def __init__(
        self, size: int, *, eps: float, kernels: Kernels, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weight = torch.empty(size, device=device, dtype=dtype)
        self._eps = eps
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, size] -> the same shape"""
        return self._kernels.rms_norm(x, self.weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); `residual` may be overwritten."""
        return self._kernels.add_rms_norm(x, residual, self.weight, self._eps)

    def targets(self) -> dict[str, Target]:
        return {"weight": whole(self.weight)}
