"""Low-rank additions of all adapters of a step: two kernels, however many adapters there are.

Rows are grouped by adapter and cut into tiles of one adapter each. Tables on the device say where a
slot's tensors lie, as distances from one address, and how large they are: an adapter of rank 4 is
as little work as its rank beside one of rank 64. Programs of parts that a slot does not have end at
once.

Source: Chen et al. 2023, Punica, arXiv:2310.18547."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from sapwood.kernels.low_rank import AdapterRoom, AdapterRows, LowRank, LowRankLayer
from sapwood.kernels.transfer import upload_one
from sapwood.kernels.triton.grouped_matmul import _multiply

_TILE = 16
"""Rows of a program; the matrix units take no fewer."""
_RANKS = 16
"""Ranks of a program, likewise."""
_FIELDS = 5


@triton.jit
def _shrink(
    x_ptr, x_stride, rows_ptr, tiles_ptr, base_ptr, slots_ptr, out_ptr, out_width, num_in,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """out[i, r] = x[rows[i]] @ a[r] of the slot of tile i."""
    tile = tiles_ptr + tl.program_id(0) * 3
    slot = tl.load(tile)
    num_ranks = tl.load(slots_ptr + slot * 2 + 1)
    first = tl.program_id(1) * RANKS
    if first < num_ranks:
        i = tl.load(tile + 1) + tl.arange(0, TILE)
        in_rows = i < tl.load(tile + 2)
        row = tl.load(rows_ptr + i, mask=in_rows, other=0)
        r = first + tl.arange(0, RANKS)
        a_ptr = base_ptr + tl.load(slots_ptr + slot * 2)
        total = tl.zeros((TILE, RANKS), tl.float32)
        for begin in range(0, num_in, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x_mask = in_rows[:, None] & (k < num_in)[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)
            a_mask = (k < num_in)[:, None] & (r < num_ranks)[None, :]
            a_ptrs = a_ptr + r.to(tl.int64)[None, :] * num_in + k[:, None]
            total = _multiply(x, tl.load(a_ptrs, mask=a_mask, other=0.0), total)
        mask = in_rows[:, None] & (r < num_ranks)[None, :]
        tl.store(out_ptr + i.to(tl.int64)[:, None] * out_width + r[None, :], total, mask=mask)


@triton.jit
def _expand(
    shrunk_ptr, shrunk_width, rows_ptr, tiles_ptr, base_ptr, parts_ptr, most_parts, out_ptr,
    out_stride, BLOCK_N: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """out[rows[i], outputs] += shrunk[i, ranks] @ b, of one part of the slot of tile i."""
    tile = tiles_ptr + tl.program_id(0) * 3
    part = parts_ptr + (tl.load(tile) * most_parts + tl.program_id(2)) * FIELDS
    num_outputs = tl.load(part + 4)
    first = tl.program_id(1) * BLOCK_N
    if first < num_outputs:
        b_ptr = base_ptr + tl.load(part)
        first_rank, num_ranks = tl.load(part + 1), tl.load(part + 2)
        i = tl.load(tile + 1) + tl.arange(0, TILE)
        in_rows = i < tl.load(tile + 2)
        n = first + tl.arange(0, BLOCK_N)
        in_outputs = n < num_outputs
        total = tl.zeros((TILE, BLOCK_N), tl.float32)
        for begin in range(0, num_ranks, RANKS):
            r = begin + tl.arange(0, RANKS)
            in_ranks = r < num_ranks
            places = i.to(tl.int64)[:, None] * shrunk_width + (first_rank + r)[None, :]
            mask = in_rows[:, None] & in_ranks[None, :]
            shrunk = tl.load(shrunk_ptr + places, mask=mask, other=0.0)
            b_ptrs = b_ptr + r.to(tl.int64)[:, None] * num_outputs + n[None, :]
            b = tl.load(b_ptrs, mask=in_ranks[:, None] & in_outputs[None, :], other=0.0)
            total = _multiply(shrunk, b.to(tl.float32), total)
        row = tl.load(rows_ptr + i, mask=in_rows, other=0)
        out_ptrs = out_ptr + row[:, None] * out_stride + (tl.load(part + 3) + n)[None, :]
        mask = in_rows[:, None] & in_outputs[None, :]
        total += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """Where a layer's additions lie: distances in numbers from `base`.

    slots  [slots, 2] of each slot: distance of a, its ranks
    parts  [slots, most_parts, 5] of each part: distance of b, first rank, ranks, first output,
           outputs
    """

    base: Tensor
    slots: Tensor
    parts: Tensor
    most_parts: int
    most_ranks: int
    most_outputs: int


class TritonLowRank:
    """As LowRankLayer. Products are of fp32 sums; what is shrunk stays fp32."""

    def __init__(self, in_size: int, out_size: int) -> None:
        self._sizes = (in_size, out_size)
        self._additions: dict[int, LowRank] = {}
        self._tables: _Tables | None = None
        self._is_fixed = self._is_stale = False

    def place(self, slot: int, addition: LowRank | None) -> None:
        if addition is None:
            if self._additions.pop(slot, None) is None:
                return
        else:
            addition.check(*self._sizes)
            if self._is_fixed:
                self._check_room(slot, addition)
            self._additions[slot] = addition
        self._is_stale = True

    def add(self, x: Tensor, out: Tensor, rows: AdapterRows) -> None:
        has_some = any(slot in self._additions for slot in rows.slots)
        if not (self._is_fixed if rows.is_captured else has_some):
            return
        x = x if x.stride(1) == 1 else x.contiguous()
        there = self._tables_for(rows, x.device)
        if there.base.dtype != x.dtype:
            raise ValueError(f"an addition is {there.base.dtype}, but x is {x.dtype}")
        tiles = tiles_of(rows)
        num_in, device = self._sizes[0], x.device
        shrunk = torch.empty(len(rows.rows), there.most_ranks, device=device)
        _shrink[(len(tiles), triton.cdiv(there.most_ranks, _RANKS))](
            x, x.stride(0), rows.rows, tiles, there.base, there.slots, shrunk, there.most_ranks,
            num_in, BLOCK_K=min(128, max(16, triton.next_power_of_2(num_in))), TILE=_TILE,
            RANKS=_RANKS,
        )  # fmt: skip
        block_n = min(64, max(16, triton.next_power_of_2(there.most_outputs)))
        grid = (len(tiles), triton.cdiv(there.most_outputs, block_n), there.most_parts)
        _expand[grid](
            shrunk, there.most_ranks, rows.rows, tiles, there.base, there.parts, there.most_parts,
            out, out.stride(0), BLOCK_N=block_n, TILE=_TILE, RANKS=_RANKS, FIELDS=_FIELDS,
        )  # fmt: skip

    def fix(self, base: Tensor, num_slots: int, most_parts: int, most_ranks: int) -> None:
        """From now on the tables stay where they are, and have room for additions so large.

        base  any number of the additions' dtype on the device
        A slot more, the last one, is always empty."""
        shapes = (num_slots + 1, 2), (num_slots + 1, most_parts, _FIELDS)
        slots, parts = (
            torch.zeros(shape, dtype=torch.int64, device=base.device) for shape in shapes
        )
        self._tables = _Tables(
            base=base,
            slots=slots,
            parts=parts,
            most_parts=most_parts,
            most_ranks=most_ranks,
            most_outputs=self._sizes[1],
        )
        self._is_fixed = self._is_stale = True
        for slot, addition in self._additions.items():
            self._check_room(slot, addition)

    def refresh(self) -> None:
        """Write what was placed since the last time into the fixed tables."""
        there = self._tables
        if not self._is_stale or there is None:
            return
        slots, parts = self._numbers(there.base, len(there.slots), there.most_parts)
        device = there.base.device
        there.slots.copy_(upload_one(slots, np.int64, device))
        there.parts.copy_(upload_one(parts, np.int64, device))
        self._is_stale = False

    def _check_room(self, slot: int, addition: LowRank) -> None:
        there = self._tables
        assert there is not None, "fixed tables are there"
        sizes = slot + 1, len(addition.parts), len(addition.a)
        room = len(there.slots) - 1, there.most_parts, there.most_ranks
        if any(size > most for size, most in zip(sizes, room, strict=True)):
            raise ValueError(
                f"captured steps have room for slots, parts and ranks up to {room}, not {sizes}"
            )

    def _tables_for(self, rows: AdapterRows, device: torch.device) -> _Tables:
        if self._is_fixed:
            self.refresh()
        # A step may have slots beyond those that add to this layer.
        elif self._tables is None or self._is_stale or max(rows.slots) >= len(self._tables.slots):
            self._tables = self._new_tables(max(*self._additions, *rows.slots) + 1, device)
            self._is_stale = False
        assert self._tables is not None
        return self._tables

    def _new_tables(self, num_slots: int, device: torch.device) -> _Tables:
        found = self._additions.values()
        base = next(iter(found)).a
        most_parts = max(len(one.parts) for one in found)
        slots, parts = self._numbers(base, num_slots, most_parts)
        return _Tables(
            base=base,
            slots=upload_one(slots, np.int64, device),
            parts=upload_one(parts, np.int64, device),
            most_parts=most_parts,
            most_ranks=max(len(one.a) for one in found),
            most_outputs=max(part.b.shape[1] for one in found for part in one.parts),
        )

    def _numbers(
        self, base: Tensor, num_slots: int, most_parts: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`slots` and `parts` of the tables, for the additions that are placed now."""

        def distance(tensor: Tensor) -> int:
            if tensor.dtype != base.dtype:
                raise ValueError(f"additions are {base.dtype} and {tensor.dtype}")
            # Whole numbers: memory begins at multiples of every element's size.
            return (tensor.data_ptr() - base.data_ptr()) // base.element_size()

        slots = np.zeros((num_slots, 2), dtype=np.int64)
        parts = np.zeros((num_slots, most_parts, _FIELDS), dtype=np.int64)
        for slot, one in self._additions.items():
            slots[slot] = distance(one.a), len(one.a)
            for index, part in enumerate(one.parts):
                ranks, outputs = part.b.shape
                parts[slot, index] = (
                    distance(part.b), part.first_rank, ranks, part.first_out, outputs
                )  # fmt: skip
        return slots, parts


class TritonCapturedAdapters:
    """As CapturedAdapters. Tiles that a replay does not need are of a slot that is always empty."""

    def __init__(self, room: AdapterRoom, dtype: torch.dtype, device: torch.device) -> None:
        self._room = room
        self._base = torch.zeros(1, dtype=dtype, device=device)
        self._rows = torch.zeros(room.num_rows, dtype=torch.int64, device=device)
        num_tiles = self._num_tiles(room.num_rows)
        self._tiles = torch.zeros(num_tiles, 3, dtype=torch.int32, device=device)
        self._tiles[:, 0] = room.num_slots
        self._layers: list[TritonLowRank] = []

    def cover(self, layer: LowRankLayer, most_parts: int) -> None:
        assert isinstance(layer, TritonLowRank), "a layer of the same kernels"
        room = self._room
        layer.fix(self._base, room.num_slots, most_parts, most_parts * room.max_rank)
        self._layers.append(layer)

    def rows(self, num_rows: int) -> AdapterRows:
        tiles = self._tiles[: self._num_tiles(num_rows)]
        return AdapterRows(
            slots=(),
            starts=(0,),
            rows=self._rows[:num_rows],
            cache={"tiles": tiles},
            is_captured=True,
        )

    def take(self, rows: AdapterRows, num_rows: int) -> None:
        found = _tiles(rows)
        there = self._tiles[: self._num_tiles(num_rows)]
        padded = np.zeros((len(there), 3), dtype=np.int32)
        padded[:, 0] = self._room.num_slots
        padded[: len(found)] = found
        there.copy_(upload_one(padded, np.int32, there.device))
        self._rows[: len(rows.rows)].copy_(rows.rows)
        for layer in self._layers:
            layer.refresh()

    def _num_tiles(self, num_rows: int) -> int:
        """The most that so many rows need: each slot may have one tile that is not full."""
        return min(num_rows, num_rows // _TILE + self._room.num_slots)


def tiles_of(rows: AdapterRows) -> Tensor:
    """[tiles, 3] int32 on the device: slot, first of rows.rows, and the one after the last; made
    once per step."""
    tiles = rows.cache.get("tiles")
    if tiles is None:
        tiles = upload_one(_tiles(rows), np.int32, rows.rows.device)
        rows.cache["tiles"] = tiles
    return tiles


def _tiles(rows: AdapterRows) -> NDArray[np.int32]:
    found = [
        (slot, begin, min(begin + _TILE, end))
        for slot, start, end in zip(rows.slots, rows.starts, rows.starts[1:], strict=False)
        for begin in range(start, end, _TILE)
    ]
    return np.array(found, dtype=np.int32)
