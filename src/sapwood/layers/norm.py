"""Normalisation with learned weights, of rows that a rank has whole. Others are in
layers/norms_over_ranks.py."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from sapwood.kernels import recording
from sapwood.kernels.recording import NormColumns, Program, ScaleColumns
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.build import Build
from sapwood.layers.targets import Slice, Target, unused, whole


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

    def __init__(
        self,
        build: Build,
        size: int,
        *,
        eps: float,
        is_learned: bool = True,
        adds_one: bool = False,
    ) -> None:
        """A norm of `size` entries.

        is_learned  whether the checkpoint has a weight; else it is 1
        adds_one    the checkpoint has the weight's difference from 1. The 1 is added when the
                    weight is placed, so that all norms compute alike; the sum is rounded to the
                    model's dtype
        """
        self.weight = build.empty(size)
        self._whole_size, self._first = size, 0
        self._is_learned = is_learned
        if not is_learned:
            self.weight.fill_(1.0)
        self.eps = eps
        self._adds_one = adds_one
        self._kernels = build.kernels

    def part_of(self, whole_size: int, first: int) -> RMSNorm:
        """The same, whose weight is the checkpoint's from `first` on, of whole_size entries. Over
        the whole rows its norm is computed by NormsOverRanks."""
        other = copy(self)
        other._whole_size, other._first = whole_size, first
        return other

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)

    def targets(self) -> dict[str, Target]:
        if not self._is_learned:
            return {}
        part = Slice.unless_whole(0, self._first, self.weight.shape[0], self._whole_size)
        read = None if self._adds_one else lambda: self.weight
        return {"weight": Target((self._whole_size,), self._put, part=part, read=read)}

    def _put(self, weight: Tensor) -> None:
        self.weight.copy_(weight.float() + 1.0 if self._adds_one else weight)

    def record(self, program: Program, x: Buffer, residual: Buffer | None = None) -> Buffer:
        return _recorded(program, x, residual, self.weight, None, self.eps, centered=False)

    def record_columns(self, program: Program, x: Buffer, first: int, count: int = 1) -> None:
        """Add `count` norms of x's columns from `first` on to a recorded step, in place."""
        program.add(
            NormColumns(
                residual=x,
                first=first,
                size=self.weight.shape[0],
                count=count,
                weight=self.weight,
                bias=None,
                centered=False,
                eps=self.eps,
            )
        )


class LayerNorm:
    """(x - mean(x)) / deviation(x) * weight + bias over the last dimension.

    Source: Ba et al. 2016, arXiv:1607.06450."""

    def __init__(
        self,
        build: Build,
        size: int,
        *,
        eps: float,
        bias: bool = True,
        is_learned: bool = True,
        adds_one: bool = False,
    ) -> None:
        """A norm of `size` entries.

        bias        whether there is one
        is_learned  whether there are weight and bias at all
        adds_one    as in RMSNorm
        """
        self._is_learned = is_learned
        self._adds_one = adds_one
        self._weight = build.empty(size)
        if not is_learned:
            self._weight.fill_(1.0)
        self._bias = build.empty(size) if bias and is_learned else None
        self._eps = eps
        self._kernels = build.kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.layer_norm(x, self._weight, self._bias, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self(total), total

    def targets(self) -> dict[str, Target]:
        if not self._is_learned:
            return {}
        found = {"weight": replace(whole(self._weight), put=self._put, read=None)}
        if self._bias is not None:
            found["bias"] = whole(self._bias)
        return found

    def _put(self, weight: Tensor) -> None:
        self._weight.copy_(weight.float() + 1.0 if self._adds_one else weight)

    def record(self, program: Program, x: Buffer, residual: Buffer | None = None) -> Buffer:
        return _recorded(program, x, residual, self._weight, self._bias, self._eps, centered=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNormForm:
    """A LayerNorm of each head's entries, of queries and of keys.

    bias       whether there is one
    is_shared  whether all heads have the same weight; else each has its own
    separate   name of the norms of single heads, "<separate>.<head>.weight"; None: one tensor
    """

    bias: bool = False
    is_shared: bool = False
    separate: str | None = None


class HeadLayerNorm:
    """The norm of queries, or of keys, of that form."""

    def __init__(
        self,
        build: Build,
        form: HeadNormForm,
        heads: tuple[int, int, int],
        *,
        eps: float,
        order: Tensor,
    ) -> None:
        """A norm of this rank's heads.

        heads  (heads of all ranks, this rank's first one, this rank's number)
        order  [head_dim] int64: the checkpoint's entries in the order of the computation
        """
        self._all, self._first, self._own = heads
        self._head_dim = order.numel()
        self._kernels = build.kernels
        self._eps = eps
        self._order = order
        self._separate = form.separate
        self._is_shared = form.is_shared
        rows = 1 if form.is_shared else self._own
        self._weight = build.empty(rows, self._head_dim)
        self._bias = build.empty(rows, self._head_dim) if form.bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads * head_dim] -> the same shape"""
        each = x.reshape(-1, self._head_dim)
        if self._is_shared:
            bias = None if self._bias is None else self._bias[0]
            return self._kernels.layer_norm(each, self._weight[0], bias, self._eps).view_as(x)
        out = self._kernels.layer_norm(each, None, None, self._eps).view(
            x.shape[0], self._own, self._head_dim
        )
        out = out * self._weight
        return (out if self._bias is None else out + self._bias).view_as(x)

    def record_columns(self, program: Program, x: Buffer, first: int) -> None:
        """Add the norms of x's columns from `first` on to a recorded step, in place."""
        weight, bias = self._weight, self._bias
        program.add(
            NormColumns(
                residual=x,
                first=first,
                size=self._head_dim,
                count=self._own,
                weight=weight[0] if self._is_shared else None,
                bias=bias[0] if self._is_shared and bias is not None else None,
                centered=True,
                eps=self._eps,
            )
        )
        if not self._is_shared:
            shifts = None if bias is None else bias.flatten()
            factors = weight.flatten()
            program.add(ScaleColumns(residual=x, first=first, factors=factors, shifts=shifts))

    def targets(self) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for name, own in (("weight", self._weight), ("bias", self._bias)):
            if own is None:
                continue
            if self._separate is not None:
                for head in range(self._all):
                    is_own = self._first <= head < self._first + self._own
                    found[f"{self._separate}.{head}.{name}"] = (
                        self._target(own[head - self._first], (self._head_dim,))
                        if is_own
                        else unused((self._head_dim,))
                    )
            elif self._is_shared:
                found[name] = self._target(own[0], (self._head_dim,))
            else:
                found[name] = self._target(own, (self._all, self._head_dim))
        return found

    def _target(self, own: Tensor, shape: tuple[int, ...]) -> Target:
        first, number = self._first, self._own

        def put(tensor: Tensor) -> None:
            rows = tensor[first : first + number] if len(shape) == 2 else tensor
            own.copy_(rows[..., self._order.to(tensor.device)])

        return Target(shape, put)


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
