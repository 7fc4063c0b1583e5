"""Normalisation with learned weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


class LayerNorm:
    """(x - mean(x)) / deviation(x) * weight + bias over the last dimension; every rank holds both.

    Source: Ba et al. 2016, arXiv:1607.06450."""

    def __init__(self, size: int, *, eps: float, device: torch.device, dtype: torch.dtype) -> None:
        self._weight = torch.empty(size, device=device, dtype=dtype)
        self._bias = torch.empty(size, device=device, dtype=dtype)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, size] -> the same shape"""
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)

    def targets(self) -> dict[str, Target]:
        return {"weight": whole(self._weight), "bias": whole(self._bias)}
