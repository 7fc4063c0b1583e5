"""Normalisation with learned weights. Every rank holds the whole weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from sapwood.kernels import recording
from sapwood.kernels.recording import Buffer, Program
from sapwood.layers.build import Build
from sapwood.layers.targets import Target, whole


class Norm(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, size] -> the same shape"""
        ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); `residual` may be overwritten."""
        ...

    def targets(self) -> dict[str, Target]: ...

    def record(self, program: Program, x: Buffer, residual: Buffer | None = None) -> Buffer:
        """Add norm(x) to a recorded step; with a residual, add x to it before and take its norm."""
        ...


class RMSNorm:
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, build: Build, size: int, *, eps: float, adds_one: bool = False) -> None:
        """adds_one: the checkpoint has the weight's difference from 1. The 1 is added when the
        weight is placed, so that all norms compute alike; the sum is rounded to the model's dtype.
        """
        self.weight = build.empty(size)
        self._eps = eps
        self._adds_one = adds_one
        self._kernels = build.kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, self.weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self._kernels.add_rms_norm(x, residual, self.weight, self._eps)

    def targets(self) -> dict[str, Target]:
        return {"weight": replace(whole(self.weight), put=self._put)}

    def _put(self, weight: Tensor) -> None:
        self.weight.copy_(weight.float() + 1.0 if self._adds_one else weight)

    def record(self, program: Program, x: Buffer, residual: Buffer | None = None) -> Buffer:
        return _recorded(program, x, residual, self.weight, None, self._eps, centered=False)


class LayerNorm:
    """(x - mean(x)) / deviation(x) * weight + bias over the last dimension.

    Source: Ba et al. 2016, arXiv:1607.06450."""

    def __init__(self, build: Build, size: int, *, eps: float, bias: bool = True) -> None:
        self._weight = build.empty(size)
        self._bias = build.empty(size) if bias else None
        self._eps = eps
        self._kernels = build.kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.layer_norm(x, self._weight, self._bias, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self(total), total

    def targets(self) -> dict[str, Target]:
        found = {"weight": whole(self._weight)}
        if self._bias is not None:
            found["bias"] = whole(self._bias)
        return found

    def record(self, program: Program, x: Buffer, residual: Buffer | None = None) -> Buffer:
        return _recorded(program, x, residual, self._weight, self._bias, self._eps, centered=True)


def _recorded(
    program: Program,
    x: Buffer,
    residual: Buffer | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centered: bool,
) -> Buffer:
    out = program.buffer(x.width)
    program.add(
        recording.Norm(
            x=x, residual=residual, weight=weight, bias=bias, centered=centered, eps=eps, out=out
        )
    )
    return out
