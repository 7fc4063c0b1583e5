"""Low-rank additions in one call into C++ (csrc/low_rank.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.tensors import DTYPES
from sapwood.kernels.low_rank import AdapterRows, LowRank

AdapterTuple = tuple[list[int], list[int], int]
NO_ADAPTERS: AdapterTuple = ([], [], 0)


def adapter_tuple(rows: AdapterRows | None) -> AdapterTuple:
    """Rows as the compiled module takes them; the caller keeps them alive."""
    if rows is None:
        return NO_ADAPTERS
    if rows.rows.dtype != torch.int64 or not rows.rows.is_contiguous():
        raise ValueError("rows with adapters must be int64 and contiguous")
    if rows.starts[0] != 0 or rows.starts[-1] != rows.rows.numel():
        raise ValueError(f"{rows.rows.numel()} rows do not fit their places {rows.starts}")
    return list(rows.slots), list(rows.starts), rows.rows.data_ptr()


class NativeLowRank:
    """As LowRankLayer. `native` is what a recorded step takes."""

    def __init__(self, context: _native.Context, in_size: int, out_size: int) -> None:
        self.sizes = (in_size, out_size)
        self.native = _native.LowRankLayer(in_size, out_size)
        self._context = context
        self._additions: dict[int, LowRank] = {}  # the compiled module has their addresses only

    def place(self, slot: int, addition: LowRank | None) -> None:
        if addition is None:
            self.native.place(slot, 0, 0, [])
            self._additions.pop(slot, None)
            return
        addition.check(*self.sizes)
        tensors = [addition.a, *(part.b for part in addition.parts)]
        dtype = addition.a.dtype
        if dtype not in DTYPES or any(t.dtype != dtype or not t.is_contiguous() for t in tensors):
            raise ValueError("an addition must be contiguous, and of one dtype that kernels have")
        parts = [
            (part.first_rank, part.b.shape[0], part.first_out, part.b.shape[1], part.b.data_ptr())
            for part in addition.parts
        ]
        self.native.place(slot, addition.a.data_ptr(), addition.a.shape[0], parts)
        self._additions[slot] = addition

    def add(self, x: Tensor, out: Tensor, rows: AdapterRows) -> None:
        num_rows, in_size = x.shape
        if (in_size, out.shape[1]) != self.sizes or out.shape[0] != num_rows:
            raise ValueError(f"x {list(x.shape)} and out {list(out.shape)} do not fit {self.sizes}")
        if out.dtype not in (x.dtype, torch.float32) or out.stride(1) != 1 or x.stride(1) != 1:
            raise ValueError(f"{x.dtype} cannot be added to {out.dtype}, or a row is in pieces")
        for slot in rows.slots:
            addition = self._additions.get(slot)
            if addition is not None and addition.a.dtype != x.dtype:
                raise ValueError(f"an addition is {addition.a.dtype}, but x is {x.dtype}")
        self.native.add(
            self._context, DTYPES[x.dtype], x.data_ptr(), x.stride(0), num_rows, out.data_ptr(),
            out.stride(0), out.dtype == torch.float32, adapter_tuple(rows),
        )  # fmt: skip
