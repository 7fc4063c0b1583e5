"""Linear layers over one or several ranks, and the fused ones.

A column-parallel layer splits its outputs over the ranks, and a row-parallel one its inputs, so
that a pair of them needs one sum over ranks (Shoeybi et al. 2019, arXiv:1909.08053). Fused layers
keep the parts of several checkpoint tensors in one weight: one matrix product instead of three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.interface import Kernels, PackedLinear
from sapwood.layers.targets import Target


@dataclass(frozen=True, slots=True)
class Part:
    """A checkpoint tensor inside a column-parallel weight.

    name         of the layer in the checkpoint: "q_proj", …
    whole_size   its outputs over all ranks, as in the checkpoint
    first, size  this rank's outputs: rows first .. first + size of the checkpoint's tensor
    """

    name: str
    whole_size: int
    first: int
    size: int


def even_part(name: str, whole_size: int, group: Group) -> Part:
    """The rank's share of outputs that are split evenly; ConfigError if they cannot be."""
    size = divide(whole_size, group, f"the {whole_size} outputs of {name}")
    return Part(name, whole_size, group.rank * size, size)


def divide(size: int, group: Group, what: str) -> int:
    """size / group.size, or a ConfigError that says what does not divide."""
    if size % group.size:
        raise ConfigError(
            f"{what} cannot be split evenly over {group.size} ranks; "
            f"choose a --tp-size that divides {size}"
        )
    return size // group.size


class Linear:
    """A weight [out, in] and perhaps a bias [out]: filled through targets, then packed once.

    `pack` hands the weight to the kernels and forgets it, so that it is not held twice.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        bias: bool,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        shared_weight: Tensor | None = None,
    ) -> None:
        """`shared_weight` [out, in] belongs to another layer, which fills it."""
        self._kernels = kernels
        if shared_weight is None:
            shared_weight = torch.empty(out_size, in_size, device=device, dtype=dtype)
        self._weight: Tensor | None = shared_weight
        self._bias = torch.empty(out_size, device=device, dtype=dtype) if bias else None
        self._packed: PackedLinear | None = None

    @property
    def weight(self) -> Tensor:
        """[out, in]; RuntimeError once it is packed."""
        if self._weight is None:
            raise RuntimeError("this layer is packed: its weight can no longer be read or replaced")
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    def pack(self) -> None:
        if self._packed is None:
            self._packed = self._kernels.pack_linear(self.weight, self._bias)
            self._weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]"""
        if self._packed is None:
            raise RuntimeError(
                "this layer is not packed; call the model's finalize() after loading"
            )
        return self._packed(x)


class ColumnParallelLinear:
    """Outputs split over the ranks; `parts` lie one after another in the fused weight."""

    def __init__(
        self,
        in_size: int,
        parts: tuple[Part, ...],
        *,
        bias: bool,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._in_size = in_size
        self._parts = parts
        out_size = sum(part.size for part in parts)
        self.linear = Linear(
            in_size, out_size, bias=bias, kernels=kernels, device=device, dtype=dtype
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, this rank's outputs, part by part]"""
        return self.linear(x)

    def targets(self) -> dict[str, Target]:
        """ "<part>.weight" and, with a bias, "<part>.bias"."""
        found: dict[str, Target] = {}
        start = 0
        for part in self._parts:
            rows = slice(start, start + part.size)
            shape = (part.whole_size, self._in_size)
            found[f"{part.name}.weight"] = _rows_target(shape, self.linear.weight[rows], part)
            if self.linear.bias is not None:
                bias = self.linear.bias[rows]
                found[f"{part.name}.bias"] = _rows_target((part.whole_size,), bias, part)
            start += part.size
        return found


class RowParallelLinear:
    """Inputs split over the ranks; the partial outputs are summed over them."""

    def __init__(
        self,
        name: str,
        in_size: int,
        out_size: int,
        *,
        bias: bool,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._name = name
        self._group = group
        self._whole_shape = (out_size, in_size)
        self._in_size = divide(in_size, group, f"the {in_size} inputs of {name}")
        self._bias = bias
        # One rank adds the bias; were it on each, the sum would have it group.size times.
        self.linear = Linear(
            self._in_size,
            out_size,
            bias=bias and group.rank == 0,
            kernels=kernels,
            device=device,
            dtype=dtype,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, this rank's inputs] -> [T, out], the same on every rank"""
        return self._group.all_reduce(self.linear(x))

    def targets(self) -> dict[str, Target]:
        weight, bias = self.linear.weight, self.linear.bias
        first = self._group.rank * self._in_size

        def place_weight(tensor: Tensor) -> None:
            weight.copy_(tensor[:, first : first + self._in_size])

        def place_bias(tensor: Tensor) -> None:
            if bias is not None:
                bias.copy_(tensor)

        found = {f"{self._name}.weight": Target(self._whole_shape, place_weight)}
        if self._bias:
            found[f"{self._name}.bias"] = Target(self._whole_shape[:1], place_bias)
        return found


def _rows_target(shape: tuple[int, ...], rows: Tensor, part: Part) -> Target:
    def place(tensor: Tensor) -> None:
        rows.copy_(tensor[part.first : part.first + part.size])

    return Target(shape, place)
