"""A mixture's experts with torch: those that were chosen, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sapwood.kernels.interface import PackedLinear


class Experts:
    """As PackedExperts: expert by expert, each with a copy of the tokens that chose it. The numbers
    of these are read on the host, so that no device can capture the op."""

    def __init__(
        self,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        activate_and_mul: Callable[[Tensor], Tensor],
    ) -> None:
        check_experts(len(gate_up), len(down))
        self._gate_up = gate_up
        self._down = down
        self._activate_and_mul = activate_and_mul

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        num_chosen = chosen.shape[1]
        by_expert = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self._gate_up)).tolist()
        check_chosen(len(counts) - 1, len(self._gate_up))
        tokens = by_expert // num_chosen
        shares = weights.flatten().index_select(0, by_expert).unsqueeze(1)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            own = slice(start, start + count)
            inner = self._activate_and_mul(self._gate_up[expert](x.index_select(0, tokens[own])))
            out.index_add_(0, tokens[own], self._down[expert].fp32(inner) * shares[own])
            start += count
        return out.to(x.dtype)


def check_experts(num_gates: int, num_outputs: int) -> None:
    if num_gates != num_outputs:
        raise ValueError(f"there are {num_gates} gates and {num_outputs} outputs of experts")


def check_chosen(largest: int, num_experts: int) -> None:
    """ValueError for an expert that is not there."""
    if largest >= num_experts:
        raise ValueError(f"expert {largest} is chosen, but there are {num_experts} experts")
