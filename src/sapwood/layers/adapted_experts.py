"""Adapters of a mixture's experts.

A recorded step has them. Op by op, the op of all experts has no adapters: rows whose adapters add
to experts of this layer are computed expert by expert; all other rows take the op, as if there were
no adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sapwood.kernels.low_rank import AdapterRows, LowRankLayer
from sapwood.layers.adapters import StepAdapters
from sapwood.layers.build import Build
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""As PackedExperts."""


class AdaptedExperts:
    """The linear layers of this rank's experts, and which slots have additions to some of them."""

    def __init__(
        self,
        build: Build,
        gate_up: Sequence[ColumnParallelLinear],
        down: Sequence[RowParallelLinear],
        activate: Callable[[Tensor], Tensor],
    ) -> None:
        """`activate` computes what `down` takes from what `gate_up` gives."""
        assert build.adapters is not None
        self._context = build.adapters
        self._layers = list(zip(gate_up, down, strict=True))
        self._activate = activate
        self._slots: Counter[int] = Counter()
        for site in (*(up.site for up in gate_up), *(out.site for out in down)):
            assert site is not None
            # A captured step has no adapters of experts.
            is_recorded = not build.kernels.can_be_captured
            site.belongs_to_experts(self._slots, is_recorded=is_recorded)

    @property
    def additions(self) -> tuple[list[LowRankLayer], list[LowRankLayer]]:
        """To each expert's first and last layer, as a recorded step takes them."""
        sites = ([up.site for up, _ in self._layers], [down.site for _, down in self._layers])
        first, last = ([site.layer for site in side if site is not None] for side in sites)
        return first, last

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, mix: Mix, *, weighs_inputs: bool
    ) -> Tensor:
        """As `mix`, and what the adapters of the step that is computed now add."""
        slots = self._slots_of(x, self._context.step)
        if slots is None:
            return mix(x, chosen, weights)
        adapted, others = (slots >= 0).nonzero()[:, 0], (slots < 0).nonzero()[:, 0]
        out = torch.empty_like(x)
        if len(others):
            out[others] = mix(x[others], chosen[others], weights[others])
        out[adapted] = self._one_by_one(
            x[adapted], chosen[adapted], weights[adapted], slots[adapted], weighs_inputs
        )
        return out

    def _slots_of(self, x: Tensor, step: StepAdapters | None) -> Tensor | None:
        """[T] the slot of each row whose adapter adds to experts of this layer, else -1; None:
        there is no such row."""
        if step is None or not any(self._slots[slot] for slot in step.rows.slots):
            return None
        slots = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        for slot, rows in step.rows.each():
            if self._slots[slot]:
                slots[rows] = slot
        return slots

    def _one_by_one(
        self, x: Tensor, chosen: Tensor, weights: Tensor, slots: Tensor, weighs_inputs: bool
    ) -> Tensor:
        total = torch.zeros_like(x, dtype=torch.float32)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            own, weight = x[rows], weights[rows, place, None].float()
            if weighs_inputs:
                is_own = (weight != 0).float()  # other ranks' experts have no weight here
                own, weight = (own * weight).to(x.dtype), is_own
            up, down = self._layers[expert]
            groups = _grouped(slots[rows])
            assert up.site is not None
            assert down.site is not None
            gates = up.linear(own)
            up.site.add_to(own, gates, groups)
            expanded = self._activate(gates)
            result = down.linear(expanded)
            down.site.add_to(expanded, result, groups)
            total.index_add_(0, rows, result.float() * weight)
        return total.to(x.dtype)


def _grouped(slots: Tensor) -> AdapterRows:
    """slots [n] of rows, each of which has an adapter"""
    counts = Counter(slots.tolist())
    found = sorted(counts)
    starts = [0, *accumulate(counts[slot] for slot in found)]
    return AdapterRows(slots=tuple(found), starts=tuple(starts), rows=slots.argsort(stable=True))
