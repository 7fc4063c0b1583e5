"""Low-rank additions to a linear layer, different ones for different rows: LoRA's adapters.

Source: Hu et al. 2021, arXiv:2106.09685; many adapters in one batch: Chen et al. 2023, Punica,
arXiv:2310.18547."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRankPart:
    """Outputs that some rows of `LowRank.a` are expanded to.

    first_rank  of the rows of `a`
    first_out   of the layer's outputs
    b           [ranks, outputs]; what LoRA calls B, transposed and times the scaling
    """

    first_rank: int
    first_out: int
    b: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """What one adapter adds to a linear layer: out[:, outputs] += (x @ a[ranks].T) @ b, by part.

    a      [ranks of all parts, in]; contiguous, as each `b`, and of the same dtype
    parts  their outputs are disjoint
    """

    a: Tensor
    parts: tuple[LowRankPart, ...]

    @staticmethod
    def of(parts: Sequence[tuple[int, Tensor, Tensor]], dtype: torch.dtype) -> LowRank:
        """From (first output, A [rank, in], B [outputs, rank] times the scaling) of each part.

        Parts with one A, in one place of memory, share its products."""
        found: list[LowRankPart] = []
        stacked: list[Tensor] = []
        first_ranks: dict[tuple[object, ...], int] = {}
        for first_out, a, b in parts:
            key = (a.data_ptr(), a.shape, a.stride())
            if key not in first_ranks:
                first_ranks[key] = sum(map(len, stacked))
                stacked.append(a.to(dtype))
            turned = b.t().to(dtype).contiguous()
            found.append(LowRankPart(first_rank=first_ranks[key], first_out=first_out, b=turned))
        return LowRank(a=torch.cat(stacked).contiguous(), parts=tuple(found))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.a, *(part.b for part in self.parts)))

    def to(self, device: torch.device) -> LowRank:
        """The same on another device; what is there already is not copied."""
        return self.kept_as(lambda numbers: numbers.to(device, non_blocking=True))

    def kept_as(self, copy: Callable[[Tensor], Tensor]) -> LowRank:
        """The same with `copy` of each tensor, in the order in which kernels read them."""
        a = copy(self.a)
        return LowRank(a=a, parts=tuple(replace(part, b=copy(part.b)) for part in self.parts))

    def check(self, in_size: int, out_size: int) -> None:
        """ValueError unless the addition fits a layer of these sizes."""
        ends = [part.first_out + part.b.shape[1] for part in self.parts]
        ranks = [part.first_rank + part.b.shape[0] for part in self.parts]
        if self.a.shape[1] != in_size or max(ends) > out_size or max(ranks) > self.a.shape[0]:
            raise ValueError(
                f"an addition of {self.a.shape[1]} inputs and {max(ends)} outputs does not fit a "
                f"layer of {in_size} and {out_size}"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterRows:
    """Which rows of a step have which adapter.

    slots   of the adapters, different ones
    starts  [len(slots) + 1]: slot i has the rows rows[starts[i]] .. rows[starts[i + 1] - 1]
    rows    int64 on the device of the step, different ones
    cache   of kernels: what they have made of these rows for all layers
    is_captured  a capture reads `rows` and `cache`, and each replay has others there (see
            `CapturedAdapters`): `slots` and `starts` say nothing
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    rows: Tensor
    cache: dict[str, Tensor] = field(default_factory=dict)
    is_captured: bool = False

    @staticmethod
    def from_row(first: int, num_rows: int, slot: int, device: torch.device) -> AdapterRows:
        """The rows first .. num_rows - 1 have the adapter in the slot."""
        rows = torch.arange(first, num_rows, device=device)
        return AdapterRows(slots=(slot,), starts=(0, len(rows)), rows=rows)

    def each(self) -> Iterator[tuple[int, Tensor]]:
        """(slot, its rows)"""
        for index, slot in enumerate(self.slots):
            yield slot, self.rows[self.starts[index] : self.starts[index + 1]]


class LowRankLayer(Protocol):
    """The additions to one linear layer, in numbered slots."""

    def place(self, slot: int, addition: LowRank | None) -> None:
        """From now on the slot has this addition, or none. ValueError if it does not fit."""
        ...

    def add(self, x: Tensor, out: Tensor, rows: AdapterRows) -> None:
        """out[row] += the addition of the row's slot to x[row], in fp32 and in place.

        x    [T, in] of the additions' dtype; out [T, outputs] of that dtype or fp32
        Rows without an adapter, and slots without an addition, are left alone and cost nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRoom:
    """The most that captured steps have room for.

    num_rows   of a step
    num_slots  slots are numbered from 0
    max_rank   of a part of an addition
    """

    num_rows: int
    num_slots: int
    max_rank: int


class CapturedAdapters(Protocol):
    """Additions in captured steps. Which rows have which adapter, and where the adapters' numbers
    lie, is in fixed memory, and written there before each replay."""

    def cover(self, layer: LowRankLayer, most_parts: int) -> None:
        """Captures will have the additions to this layer, each of up to so many parts. From now on
        the layer refuses larger ones."""
        ...

    def rows(self, num_rows: int) -> AdapterRows:
        """What layers add to while a step of so many rows is captured."""
        ...

    def take(self, rows: AdapterRows, num_rows: int) -> None:
        """The next replay of a capture of num_rows rows has adapters in these rows."""
        ...
