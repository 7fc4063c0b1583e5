"""Low-rank additions row by row: the definition that other kernels are compared with."""

from __future__ import annotations

from torch import Tensor

from sapwood.kernels.low_rank import AdapterRows, LowRank


class ReferenceLowRank:
    """As LowRankLayer."""

    def __init__(self, in_size: int, out_size: int) -> None:
        self._sizes = (in_size, out_size)
        self._additions: dict[int, LowRank] = {}

    def place(self, slot: int, addition: LowRank | None) -> None:
        if addition is not None:
            addition.check(*self._sizes)
            self._additions[slot] = addition
        elif slot in self._additions:
            del self._additions[slot]

    def add(self, x: Tensor, out: Tensor, rows: AdapterRows) -> None:
        for slot, own in rows.each():
            if slot not in self._additions:
                continue
            addition = self._additions[slot]
            for row in own.tolist():
                for part in addition.parts:
                    end_rank = part.first_rank + part.b.shape[0]
                    a = addition.a[part.first_rank : end_rank].double()
                    added = part.b.double().t() @ (a @ x[row].double())
                    columns = slice(part.first_out, part.first_out + part.b.shape[1])
                    out[row, columns] = (out[row, columns].double() + added).to(out.dtype)
