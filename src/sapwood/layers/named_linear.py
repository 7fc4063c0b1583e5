"""Linear layers that are whole on every rank, by their names in the checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.linear import ColumnParallelLinear, Part
from sapwood.layers.targets import Target, once_filled


class NamedLinear:
    """One linear layer, or several of the same input as one matrix product."""

    def __init__(
        self,
        build: Build,
        in_size: int,
        outputs: Mapping[str, int],
        *,
        bias: bool = True,
        without_bias: Collection[str] = (),
    ) -> None:
        """Layers without weights.

        outputs       of each layer, by its name in the checkpoint, in the order of the product
        without_bias  those of them whose bias the checkpoint lacks, though others have one"""
        parts = tuple(Part(name, size, 0, size) for name, size in outputs.items())
        self._sizes = list(outputs.values())
        self._layer = ColumnParallelLinear(build, in_size, parts, bias=bias)
        self._absent = {f"{name}.bias" for name in without_bias}
        if self._absent and self._layer.linear.bias is not None:
            self._layer.linear.bias.zero_()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, all outputs]"""
        return self._layer(x)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, in] -> each layer's outputs"""
        return torch.split(self._layer(x), self._sizes, dim=-1)

    def targets(self) -> dict[str, Target]:
        """The layer is packed once it is filled."""
        found = self._layer.targets()
        there = {name: target for name, target in found.items() if name not in self._absent}
        return once_filled(there, self._layer.linear.pack)


def linear(
    build: Build, name: str, in_size: int, out_size: int, *, bias: bool = True
) -> NamedLinear:
    return NamedLinear(build, in_size, {name: out_size}, bias=bias)
