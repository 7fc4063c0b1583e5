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
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels, PackedLinear
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.quantization.interface import LinearScheme, LinearStorage
from sapwood.layers.targets import Target


@dataclass(frozen=True, slots=True)
class Part:
    """A checkpoint tensor inside a column-parallel weight.

    name         the layer's name in the checkpoint: "q_proj", …
    whole_size   outputs of all ranks together, as in the checkpoint
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

    The scheme decides how the weight is stored and multiplied. `pack` hands the weight to the
    kernels and forgets it, so that it is not held twice.
    """

    def __init__(
        self,
        in_size: int,
        part_sizes: tuple[int, ...],
        *,
        bias: bool,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        scheme: LinearScheme = DENSE,
        makes_logits: bool = False,
        tied: bool = False,
    ) -> None:
        """`makes_logits` and `tied` as in LinearScheme.storage."""
        self._storage: LinearStorage | None = scheme.storage(
            in_size,
            part_sizes,
            makes_logits=makes_logits,
            tied=tied,
            kernels=kernels,
            device=device,
            dtype=dtype,
        )
        out_size = sum(part_sizes)
        self._bias = torch.empty(out_size, device=device, dtype=dtype) if bias else None
        self._packed: PackedLinear | None = None

    @property
    def storage(self) -> LinearStorage:
        """The storage of the weight until `pack`; RuntimeError afterwards."""
        if self._storage is None:
            raise RuntimeError("this layer is packed: its weight can no longer be read or replaced")
        return self._storage

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]; RuntimeError after `pack`, or if the scheme has no such tensor."""
        return self.storage.weight

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def packed(self) -> PackedLinear:
        """The layer as the kernels have packed it; RuntimeError before `pack`."""
        if self._packed is None:
            raise RuntimeError(
                "this layer is not packed; call the model's finalize() after loading"
            )
        return self._packed

    def pack(self) -> None:
        if self._packed is None:
            self._packed = self.storage.pack(self._bias)
            self._storage = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]"""
        return self.packed(x)


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
        scheme: LinearScheme = DENSE,
    ) -> None:
        self._in_size = in_size
        self._parts = parts
        self.linear = Linear(
            in_size,
            tuple(part.size for part in parts),
            bias=bias,
            kernels=kernels,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, this rank's outputs, part by part]"""
        return self.linear(x)

    def targets(self) -> dict[str, Target]:
        """ "<part>.weight" and, with a bias, "<part>.bias"."""
        found: dict[str, Target] = {}
        start = 0
        for index, part in enumerate(self._parts):
            shape = (part.whole_size, self._in_size)
            found[f"{part.name}.weight"] = _rows_target(shape, self.linear.storage, index, part)
            if self.linear.bias is not None:
                bias = self.linear.bias[start : start + part.size]
                found[f"{part.name}.bias"] = _bias_target(bias, part)
            start += part.size
        return found


class RowParallelLinear:
    """Inputs split over the ranks; the partial outputs are summed over all ranks."""

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
        scheme: LinearScheme = DENSE,
    ) -> None:
        self._name = name
        self._group = group
        self._whole_shape = (out_size, in_size)
        self._in_size = divide(in_size, group, f"the {in_size} inputs of {name}")
        self._bias = bias
        # Only one rank adds the bias: otherwise the sum over ranks would have it several times.
        self.linear = Linear(
            self._in_size,
            (out_size,),
            bias=bias and group.rank == 0,
            kernels=kernels,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, this rank's inputs] -> [T, out], the same on every rank"""
        return self._group.all_reduce(self.linear(x))

    def targets(self) -> dict[str, Target]:
        storage, bias = self.linear.storage, self.linear.bias
        first = self._group.rank * self._in_size

        def place_weight(tensor: Tensor) -> None:
            storage.place(0, tensor[:, first : first + self._in_size])

        def place_blocks(weight: LinearPart) -> None:
            storage.place_blocks(0, self._own_columns(weight, first))

        def place_bias(tensor: Tensor) -> None:
            if bias is not None:
                bias.copy_(tensor)

        blocks = place_blocks if storage.takes_blocks else None
        found = {f"{self._name}.weight": Target(self._whole_shape, place_weight, blocks)}
        if self._bias:
            found[f"{self._name}.bias"] = Target(self._whole_shape[:1], place_bias)
        return found

    def _own_columns(self, weight: LinearPart, first: int) -> LinearPart:
        try:
            return weight.columns(first, self._in_size)
        except ValueError as error:
            raise ConfigError(
                f"the {self._whole_shape[1]} inputs of {self._name} over {self._group.size} ranks: "
                f"{error}; choose a smaller --tp-size, or leave out --quantization"
            ) from error


def _rows_target(shape: tuple[int, ...], storage: LinearStorage, index: int, part: Part) -> Target:
    """The target of one part, which the storage knows by `index`."""

    def place(tensor: Tensor) -> None:
        storage.place(index, tensor[part.first : part.first + part.size])

    def place_blocks(weight: LinearPart) -> None:
        storage.place_blocks(index, weight.rows(part.first, part.size))

    return Target(shape, place, place_blocks if storage.takes_blocks else None)


def _bias_target(rows: Tensor, part: Part) -> Target:
    def place(tensor: Tensor) -> None:
        rows.copy_(tensor[part.first : part.first + part.size])

    return Target((part.whole_size,), place)
