"""A mixture's experts with torch: those that were chosen, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.interface import Kernels
from sapwood.kernels.packed import PackedLinear


class Experts:
    """As PackedExperts: expert by expert, each with a copy of the tokens that chose it. The numbers
    of these are read on the host, so that no device can capture the op."""

    can_be_captured = False

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


def limited(gates: Tensor, limit: float | None) -> Tensor:
    """gates [T, 2 * I], the gate's first, as `limit` of Kernels.pack_experts says."""
    if limit is None:
        return gates
    gate, up = gates.chunk(2, dim=-1)
    return torch.cat((gate.clamp(max=limit), up.clamp(-limit, limit) + 1), dim=-1)


def activation_of(
    kernels: Kernels, activation: Activation, limit: float | None, *, gated: bool
) -> Callable[[Tensor], Tensor]:
    """What an expert's output layer takes, from what the first layer gives [T, I], or with a gate
    [T, 2 * I]; ValueError for a limit without gates."""
    if gated:
        return lambda gates: kernels.activate_and_mul(limited(gates, limit), activation)
    if limit is not None:
        raise ValueError("only experts with gates have limits")
    return lambda up: kernels.activate(up, activation)


def check_experts(num_gates: int, num_outputs: int) -> None:
    if num_gates != num_outputs:
        raise ValueError(f"there are {num_gates} gates and {num_outputs} outputs of experts")


def check_chosen(largest: int, num_experts: int) -> None:
    """ValueError for an expert that is not there."""
    if largest >= num_experts:
        raise ValueError(f"expert {largest} is chosen, but there are {num_experts} experts")
