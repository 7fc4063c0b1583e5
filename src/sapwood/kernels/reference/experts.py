"""A mixture of experts, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.routing import Routing, Scores
from sapwood.kernels.torch_ops.experts import check_chosen, check_experts


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """As Kernels.route."""
    routing.check(logits.shape[1])
    corrections = [0.0] * logits.shape[1] if bias is None else bias.tolist()
    sides: tuple[list[list[float]], list[list[int]]] = ([], [])
    for row in logits.float():
        pairs = _sparsemixer(row, routing) if routing.scores is Scores.SPARSEMIXER else None
        pairs = _scored(row, corrections, routing) if pairs is None else pairs
        sides[0].append([weight * routing.scale for weight, _ in pairs])
        sides[1].append([expert for _, expert in pairs])
    shape = (len(logits), routing.num_chosen)
    weights = torch.tensor(sides[0], dtype=torch.float32, device=logits.device).view(shape)
    return weights, torch.tensor(sides[1], dtype=torch.int64, device=logits.device).view(shape)


def _scored(row: Tensor, corrections: list[float], routing: Routing) -> list[tuple[float, int]]:
    is_softmax = routing.scores is Scores.SOFTMAX
    scores = (row.softmax(0) if is_softmax else row.sigmoid()).tolist()
    wanted: list[float] = (torch.tensor(scores) + torch.tensor(corrections)).tolist()
    size = len(scores) // routing.num_groups
    groups = [range(first, first + size) for first in range(0, len(scores), size)]

    def of_group(group: range) -> float:
        return sum(sorted((wanted[expert] for expert in group), reverse=True)[: routing.group_best])

    best_groups = sorted(groups, key=of_group, reverse=True)[: routing.num_groups_chosen]
    possible = sorted(expert for group in best_groups for expert in group)
    chosen = sorted(possible, key=wanted.__getitem__, reverse=True)[: routing.num_chosen]
    total = max(sum(scores[expert] for expert in chosen), routing.least_sum)
    return [
        (scores[expert] / total if routing.renormalise else scores[expert], expert)
        for expert in chosen
    ]


def _sparsemixer(row: Tensor, routing: Routing) -> list[tuple[float, int]]:
    logits = row.tolist()
    left = set(range(len(logits)))
    found: list[tuple[float, int]] = []
    for _ in range(routing.num_chosen):
        best = max(left, key=lambda expert: (logits[expert], -expert))
        near = [
            logits[expert]
            for expert in left
            if logits[best] - logits[expert]
            <= 2 * routing.jitter * max(abs(logits[expert]), logits[best])
        ]
        total = sum(math.exp(logit - logits[best]) for logit in near)
        found.append((1.0 / total, best))
        left.remove(best)
    return found


@dataclass(frozen=True, slots=True)
class Experts:
    """As PackedExperts."""

    can_be_captured: ClassVar[bool] = False
    gate_up: Sequence[PackedLinear]
    down: Sequence[PackedLinear]
    activate_and_mul: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        check_experts(len(self.gate_up), len(self.down))

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, device=x.device)
        for token, ids in enumerate(chosen.tolist()):
            check_chosen(max(ids), len(self.gate_up))
            row = x[token : token + 1]
            for place, expert in enumerate(ids):
                inner = self.activate_and_mul(self.gate_up[expert](row))
                out[token] += weights[token, place] * self.down[expert].fp32(inner)[0]
        return out.to(x.dtype)
