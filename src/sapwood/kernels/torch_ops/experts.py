"""A mixture of experts with torch: choosing experts, and computing those that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sapwood.kernels.interface import PackedLinear


def top_k_softmax(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """As Kernels.top_k_softmax."""
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}, but there are {logits.shape[1]} experts to choose from")
    probs = torch.softmax(logits.float(), dim=-1)
    # A stable sort, since topk takes any one of equal entries.
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    weights = ordered[:, :k]
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.contiguous(), ids[:, :k].contiguous()


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activate_and_mul: Callable[[Tensor], Tensor],
) -> Tensor:
    """As Kernels.experts, with `activate_and_mul` for the gates: expert by expert, each with a copy
    of the tokens that chose it. The numbers of these are read on the host."""
    num_chosen = chosen.shape[1]
    by_expert = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(gate_up)).tolist()
    if len(counts) > len(gate_up) or len(gate_up) != len(down):
        raise ValueError(
            f"expert {len(counts) - 1} is chosen, but there are {len(gate_up)} gates and "
            f"{len(down)} outputs of experts"
        )
    tokens = by_expert // num_chosen
    shares = weights.flatten().index_select(0, by_expert).unsqueeze(1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        own = slice(start, start + count)
        inner = activate_and_mul(gate_up[expert](x.index_select(0, tokens[own])))
        out.index_add_(0, tokens[own], down[expert].fp32(inner) * shares[own])
        start += count
    return out.to(x.dtype)
