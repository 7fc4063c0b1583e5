"""Low-rank additions, with torch: two products per adapter of the step."""

from __future__ import annotations

from torch import Tensor

from sapwood.kernels.low_rank import AdapterRows, LowRank


class TorchLowRank:
    """As LowRankLayer, on any device. Products are of fp32."""

    def __init__(self, in_size: int, out_size: int) -> None:
        self._sizes = (in_size, out_size)
        self._additions: dict[int, LowRank] = {}

    def place(self, slot: int, addition: LowRank | None) -> None:
        if addition is None:
            self._additions.pop(slot, None)
            return
        addition.check(*self._sizes)
        self._additions[slot] = addition

    def add(self, x: Tensor, out: Tensor, rows: AdapterRows) -> None:
        for slot, own in rows.each():
            addition = self._additions.get(slot)
            if addition is None:
                continue
            shrunk = x.index_select(0, own).float() @ addition.a.float().t()
            for part in addition.parts:
                ranks, outputs = part.b.shape
                mine = shrunk[:, part.first_rank : part.first_rank + ranks]
                columns = out[:, part.first_out : part.first_out + outputs]
                added = columns.index_select(0, own).float() + mine @ part.b.float()
                columns.index_copy_(0, own, added.to(out.dtype))
