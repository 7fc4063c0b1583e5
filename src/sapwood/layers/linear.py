"""Linear layers over one or several ranks, and the fused ones.

A column-parallel layer splits its outputs over the ranks, and a row-parallel one its inputs, so
that a pair of them needs one sum over ranks (Shoeybi et al. 2019, arXiv:1909.08053). Fused layers
keep the parts of several checkpoint tensors in one weight: one matrix product instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.recording import Multiply, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.adapters import AdapterTarget
from sapwood.layers.build import Build
from sapwood.layers.quantization.interface import LinearStorage
from sapwood.layers.targets import Slice, Target, unused, whole


class Addition(Protocol):
    """Adds to a linear layer's outputs."""

    def __call__(self, x: Tensor, outputs: Tensor) -> None:
        """x [T, in]; outputs [T, out], changed in place"""
        ...

    def record(self, program: Program, x: Buffer, outputs: Buffer) -> None:
        """Add the same to a recorded step; RuntimeError before `pack`."""
        ...


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrangement:
    """How a checkpoint keeps a column-parallel layer, if not as one tensor [out, in] per part.

    rows        per part: which rows of the checkpoint's tensor are this rank's, in the order in
                which the layer computes them, [size of the part] int64
    fused       name of the one tensor that holds several parts; None: each part has its own
    fused_parts indices of the parts that it holds, which are neighbours; None: all of them
    transposed  whether weights are [in, out]
    """

    rows: tuple[Tensor, ...]
    fused: str | None = None
    transposed: bool = False
    fused_parts: tuple[int, ...] | None = None

    @staticmethod
    def in_sequence(
        parts: Sequence[Part], *, fused: str | None = None, transposed: bool = False
    ) -> Arrangement:
        """Rows in their own order; in a fused tensor, one part after another."""
        rows, start = [], 0
        for part in parts:
            rows.append(start + torch.arange(part.first, part.first + part.size))
            start += part.whole_size if fused is not None else 0
        return Arrangement(rows=tuple(rows), fused=fused, transposed=transposed)


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


def share(number: int, group: Group, what: str) -> tuple[int, int]:
    """(first, how many) of `number` things that this rank has; neighbours have the same one where
    ranks outnumber them. ConfigError if the ranks cannot have equally many."""
    if number >= group.size:
        own = divide(number, group, what)
    elif group.size % number:
        raise ConfigError(
            f"{what} cannot be shared evenly by {group.size} ranks; choose a --tp-size that is a "
            f"multiple or a divisor of {number}"
        )
    else:
        own = 1
    return group.rank * number // group.size, own


class Linear:
    """A weight [out, in] and perhaps a bias [out]: filled part by part, then packed.

    The scheme decides how the weight is stored and multiplied. `pack` hands the weight to the
    kernels and forgets it, so that it is not held twice. A packed layer can be filled again, also
    in part: it computes with the old weight until `pack` is called once more, which keeps the parts
    that were not put. While the model's Renewal is open, it packs the new weight as soon as it is
    whole, and computes with the old one until `change`.
    """

    def __init__(
        self,
        build: Build,
        in_size: int,
        part_sizes: tuple[int, ...],
        *,
        bias: bool,
        makes_logits: bool = False,
        tied: bool = False,
    ) -> None:
        """`makes_logits` and `tied` as in LinearScheme.storage."""
        self._new_storage = partial(
            build.scheme.storage,
            in_size,
            part_sizes,
            makes_logits=makes_logits,
            tied=tied,
            kernels=build.kernels,
            device=build.device,
            dtype=build.dtype,
        )
        self._storage: LinearStorage | None = self._new_storage()
        self._part_sizes = part_sizes
        self._placed: set[int] = set()
        self.takes_blocks = self._storage.takes_blocks
        self._bias = build.empty(sum(part_sizes)) if bias else None
        self._packed: PackedLinear | None = None
        self._next: PackedLinear | None = None
        self._renewal = build.renewal

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]; RuntimeError after `pack`, or if the scheme has no such tensor."""
        if self._storage is None:
            raise RuntimeError("this layer is packed: its weight can no longer be read")
        return self._storage.weight

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

    def put(self, part: int, shard: Tensor) -> None:
        """Take this rank's shard [outputs of the part, in] of a checkpoint's tensor."""
        self._open().place(part, shard)
        self._note(part)

    def put_blocks(self, part: int, shard: LinearPart) -> None:
        """Take the same shard in the checkpoint's quantised form; only if `takes_blocks`."""
        self._open().place_blocks(part, shard)
        self._note(part)

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        """Take the embedding's weight, as LinearStorage.share says."""
        self._open().share(weight, blocks)
        self._placed.update(range(len(self._part_sizes)))

    def pack(self) -> None:
        """Pack what was put since the last call, if anything was.

        Raises RuntimeError if some parts were put of a packed layer that `keeps_parts` not."""
        if self._storage is None or (self._is_beside and self._renewal.in_place):
            return
        if self._packed is not None and len(self._placed) < len(self._part_sizes):
            for part in set(range(len(self._part_sizes))) - self._placed:
                rows = self.rows_of(part)
                if rows is None:
                    raise RuntimeError("a part of a quantised layer has not been placed")
                self._storage.place(part, rows)
        if self._packed is None:
            self._packed = self._storage.pack(self._bias)
        elif self._is_beside:
            self._next = self._storage.pack(self._bias)
        else:
            self._packed = self._storage.repack(self._packed, self._bias)
        self._storage, self._placed = None, set()

    def change(self) -> PackedLinear | None:
        """Compute with what was put while the model's Renewal was open. Returns the old layer."""
        self.pack()
        if self._next is None:
            return None
        old, self._packed, self._next = self._packed, self._next, None
        return old

    def forget(self) -> None:
        """Drop what was put since the last `change`."""
        self._storage, self._placed, self._next = None, set(), None

    @property
    def keeps_parts(self) -> bool:
        """Whether a packed layer may be filled in part."""
        return len(self._part_sizes) == 1 or self.packed.unpacked() is not None

    def rows_of(self, part: int) -> Tensor | None:
        """A part [outputs, in] of the packed weight; None if it is quantised."""
        weight = self.packed.unpacked()
        first = sum(self._part_sizes[:part])
        return None if weight is None else weight[first : first + self._part_sizes[part]]

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]"""
        return self.packed(x)

    def _open(self) -> LinearStorage:
        if self._storage is None:
            self._storage = self._new_storage()
        if self._is_beside:
            self._renewal.note(self)
        return self._storage

    def _note(self, part: int) -> None:
        self._placed.add(part)
        if self._is_beside and len(self._placed) == len(self._part_sizes):
            self.pack()

    @property
    def _is_beside(self) -> bool:
        return self._packed is not None and self._renewal.is_open


class ColumnParallelLinear:
    """Outputs split over the ranks; `parts` lie one after another in the fused weight."""

    def __init__(
        self,
        build: Build,
        in_size: int,
        parts: tuple[Part, ...],
        *,
        bias: bool,
        arrangement: Arrangement | None = None,
    ) -> None:
        """`arrangement` of the checkpoint's tensors; None: one per part, as it is computed."""
        self._in_size = in_size
        self._parts = parts
        self._arrangement = arrangement
        self.linear = Linear(build, in_size, tuple(part.size for part in parts), bias=bias)
        self.site = build.adapter_site(in_size, sum(part.size for part in parts))

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, this rank's outputs, part by part]"""
        out = self.linear(x)
        if self.site is not None:
            self.site.add(x, out)
        return out

    def targets(self) -> dict[str, Target]:
        """ "<part>.weight" and, with a bias, "<part>.bias", or as the arrangement says."""
        if self._arrangement is not None:
            return self._arranged_targets(self._arrangement)
        found: dict[str, Target] = {}
        linear, start = self.linear, 0
        for index, part in enumerate(self._parts):
            own = Slice.unless_whole(0, part.first, part.size, part.whole_size)
            found[f"{part.name}.weight"] = Target(
                (part.whole_size, self._in_size),
                partial(linear.put, index),
                partial(linear.put_blocks, index) if linear.takes_blocks else None,
                part=own,
                adapter=self._adapter(
                    part.whole_size, start, slice(part.first, part.first + part.size)
                ),
                fused_with=linear,
                is_beside=True,
                read=partial(linear.rows_of, index),
            )
            if linear.bias is not None:
                rows = linear.bias[start : start + part.size]
                found[f"{part.name}.bias"] = replace(
                    whole(rows), shape=(part.whole_size,), part=own
                )
            start += part.size
        return found

    def _arranged_targets(self, arrangement: Arrangement) -> dict[str, Target]:
        starts = list(accumulate((part.size for part in self._parts), initial=0))
        fused: tuple[int, ...] = ()
        if arrangement.fused is not None:
            fused = arrangement.fused_parts or tuple(range(len(self._parts)))
        members: list[tuple[str, tuple[int, ...]]] = [
            (part.name, (index,)) for index, part in enumerate(self._parts) if index not in fused
        ]
        if arrangement.fused is not None:
            members.insert(0, (arrangement.fused, fused))
        found: dict[str, Target] = {}
        for name, parts in members:
            num_rows = sum(self._parts[index].whole_size for index in parts)
            rows = torch.cat([arrangement.rows[index] for index in parts])
            found[f"{name}.weight"] = replace(
                self._arranged_weight(arrangement, parts, num_rows),
                adapter=self._adapter(num_rows, starts[parts[0]], rows),
            )
            bias = self.linear.bias
            if bias is not None:
                own = bias[starts[parts[0]] : starts[parts[-1] + 1]]
                found[f"{name}.bias"] = Target(
                    (num_rows,), partial(_copy_rows, own, rows), is_rearranged=True
                )
        return found

    def _adapter(self, num_rows: int, first_out: int, rows: slice | Tensor) -> AdapterTarget | None:
        """For outputs that lie together from first_out on, and are these of the tensor's rows."""
        if self.site is None:
            return None
        return AdapterTarget(
            site=self.site,
            shape=(num_rows, self._in_size),
            first_out=first_out,
            outputs=lambda b: b[rows],
        )

    def _arranged_weight(
        self, arrangement: Arrangement, parts: Sequence[int], num_rows: int
    ) -> Target:
        linear, transposed = self.linear, arrangement.transposed

        def put(weight: Tensor) -> None:
            rows_first = weight.t() if transposed else weight
            for index in parts:
                linear.put(index, rows_first[arrangement.rows[index].to(weight.device)])

        def put_blocks(weight: LinearPart) -> None:
            for index in parts:
                linear.put_blocks(index, weight.chosen(arrangement.rows[index]))

        takes_blocks = linear.takes_blocks and not transposed
        shape = (self._in_size, num_rows) if transposed else (num_rows, self._in_size)
        return Target(
            shape,
            put,
            put_blocks if takes_blocks else None,
            is_rearranged=True,
            has_rows=not transposed,
            fused_with=linear,
            is_beside=True,
        )

    def record(self, program: Program, x: Buffer) -> Buffer:
        """Add the product of x to a recorded step; RuntimeError before `pack`."""
        out = program.buffer(sum(part.size for part in self._parts))
        program.add(Multiply(x=x, layer=self.linear.packed, out=out))
        if self.site is not None:
            self.site.record(program, x, out)
        return out


class RowParallelLinear:
    """Inputs split over the ranks; the partial outputs are summed over all ranks."""

    def __init__(
        self,
        build: Build,
        name: str,
        in_size: int,
        out_size: int,
        *,
        bias: bool,
        group: Group,
        transposed: bool = False,
    ) -> None:
        """A row-parallel layer.

        group       the ranks, one of build.groups
        transposed  whether the checkpoint's weight is [in, out]
        """
        self._name = name
        self._transposed = transposed
        self._group = group
        self._whole_shape = (out_size, in_size)
        self._in_size = divide(in_size, group, f"the {in_size} inputs of {name}")
        self._bias = bias
        # Only one rank adds the bias: otherwise the sum over ranks would have it several times.
        self.linear = Linear(build, self._in_size, (out_size,), bias=bias and group.rank == 0)
        self.site = build.adapter_site(self._in_size, out_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, this rank's inputs] -> [T, out], the same on every rank"""
        out = self.linear(x)
        if self.site is not None:  # of the sum over ranks, too, each rank adds its part
            self.site.add(x, out)
        return self._group.all_reduce(out)

    def targets(self) -> dict[str, Target]:
        linear, bias = self.linear, self.linear.bias
        first, in_size = self._group.rank * self._in_size, self._whole_shape[1]
        if self._transposed:
            weight = Target(
                (in_size, self._whole_shape[0]),
                lambda part: linear.put(0, part.t()),
                part=Slice.unless_whole(0, first, self._in_size, in_size),
                is_rearranged=True,
                has_rows=False,
                is_beside=True,
            )
        else:
            weight = Target(
                self._whole_shape,
                partial(linear.put, 0),
                partial(linear.put_blocks, 0) if linear.takes_blocks else None,
                part=Slice.unless_whole(1, first, self._in_size, in_size),
                is_beside=True,
                read=partial(linear.rows_of, 0),
            )
        if self.site is not None:
            own = slice(first, first + self._in_size)
            adapter = AdapterTarget(
                site=self.site, shape=self._whole_shape, inputs=lambda a: a[:, own]
            )
            weight = replace(weight, adapter=adapter)
        found = {f"{self._name}.weight": weight}
        if self._bias:
            other = unused(self._whole_shape[:1])
            found[f"{self._name}.bias"] = other if bias is None else whole(bias)
        return found

    def record(self, program: Program, x: Buffer) -> Buffer:
        """Add the product of x to a recorded step; RuntimeError before `pack`.

        Raises CannotRecord if several ranks add their products up."""
        program.refuse_sum_over(self._group.size)
        out = program.buffer(self._whole_shape[0])
        program.add(Multiply(x=x, layer=self.linear.packed, out=out))
        if self.site is not None:
            self.site.record(program, x, out)
        return out


def _copy_rows(own: Tensor, rows: Tensor, whole: Tensor) -> None:
    """own [n] = the entries `rows` [n] of `whole`"""
    own.copy_(whole[rows.to(whole.device)])
