"""Low-rank additions of all adapters of a step: two kernels, however many adapters there are.

Rows are grouped by adapter and cut into tiles of one adapter each. Tables on the device say where a
slot's tensors lie, as distances from one address, and how large they are: an adapter of rank 4 is
as little work as its rank beside one of rank 64. Programs of parts that a slot does not have end at
once.

Source: Chen et al. 2023, Punica, arXiv:2310.18547."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.low_rank import AdapterRows, LowRank
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


class TritonLowRank:
    """As LowRankLayer. Products are of fp32 sums; what is shrunk stays fp32.

    The tables have, per slot: (distance of a, its ranks), and per slot and part: (distance of b,
    first rank, ranks, first output, outputs); distances in numbers from `_base`."""

    def __init__(self, in_size: int, out_size: int) -> None:
        self._sizes = (in_size, out_size)
        self._additions: dict[int, LowRank] = {}
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None
        self._most_parts = self._most_ranks = self._most_outputs = 0

    def place(self, slot: int, addition: LowRank | None) -> None:
        if addition is None:
            if self._additions.pop(slot, None) is None:
                return
        else:
            addition.check(*self._sizes)
            self._additions[slot] = addition
        self._tables = None

    def add(self, x: Tensor, out: Tensor, rows: AdapterRows) -> None:
        if not any(slot in self._additions for slot in rows.slots):
            return
        x = x if x.stride(1) == 1 else x.contiguous()
        if self._tables is None or max(rows.slots) >= len(self._tables[1]):
            # A step may have slots beyond those that add to this layer.
            self._tables = self._new_tables(max(*self._additions, *rows.slots) + 1, x.device)
        base, slots, parts = self._tables
        if base.dtype != x.dtype:
            raise ValueError(f"an addition is {base.dtype}, but x is {x.dtype}")
        tiles = tiles_of(rows)
        num_in, device = self._sizes[0], x.device
        shrunk = torch.empty(len(rows.rows), self._most_ranks, device=device)
        _shrink[(len(tiles), triton.cdiv(self._most_ranks, _RANKS))](
            x, x.stride(0), rows.rows, tiles, base, slots, shrunk, self._most_ranks, num_in,
            BLOCK_K=min(128, max(16, triton.next_power_of_2(num_in))), TILE=_TILE, RANKS=_RANKS,
        )  # fmt: skip
        block_n = min(64, max(16, triton.next_power_of_2(self._most_outputs)))
        grid = (len(tiles), triton.cdiv(self._most_outputs, block_n), self._most_parts)
        _expand[grid](
            shrunk, self._most_ranks, rows.rows, tiles, base, parts, self._most_parts, out,
            out.stride(0), BLOCK_N=block_n, TILE=_TILE, RANKS=_RANKS, FIELDS=_FIELDS,
        )  # fmt: skip

    def _new_tables(self, num_slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(base, slots, parts) for the additions that are placed now."""
        found = self._additions
        base = next(iter(found.values())).a
        self._most_parts = max(len(one.parts) for one in found.values())
        self._most_ranks = max(len(one.a) for one in found.values())
        widths = [part.b.shape[1] for one in found.values() for part in one.parts]
        self._most_outputs = max(widths)

        def distance(tensor: Tensor) -> int:
            if tensor.dtype != base.dtype:
                raise ValueError(f"additions are {base.dtype} and {tensor.dtype}")
            # Whole numbers: memory begins at multiples of every element's size.
            return (tensor.data_ptr() - base.data_ptr()) // base.element_size()

        slots = np.zeros((num_slots, 2), dtype=np.int64)
        parts = np.zeros((num_slots, self._most_parts, _FIELDS), dtype=np.int64)
        for slot, one in found.items():
            slots[slot] = distance(one.a), len(one.a)
            for index, part in enumerate(one.parts):
                ranks, outputs = part.b.shape
                parts[slot, index] = (
                    distance(part.b), part.first_rank, ranks, part.first_out, outputs
                )  # fmt: skip
        return base, upload_one(slots, np.int64, device), upload_one(parts, np.int64, device)


def tiles_of(rows: AdapterRows) -> Tensor:
    """[tiles, 3] int32 on the device: slot, first of rows.rows, and the one after the last; made
    once per step."""
    tiles = rows.cache.get("tiles")
    if tiles is None:
        found = [
            (slot, begin, min(begin + _TILE, end))
            for slot, start, end in zip(rows.slots, rows.starts, rows.starts[1:], strict=False)
            for begin in range(start, end, _TILE)
        ]
        tiles = upload_one(np.array(found, dtype=np.int32), np.int32, rows.rows.device)
        rows.cache["tiles"] = tiles
    return tiles
