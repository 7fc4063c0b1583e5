"""The choice of experts with torch."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.routing import Routing, Scores


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """As Kernels.route."""
    routing.check(logits.shape[1])
    logits = logits.float()
    if routing.scores is Scores.SPARSEMIXER:
        return _sparsemixer(logits, routing)
    is_softmax = routing.scores is Scores.SOFTMAX
    scores = torch.softmax(logits, dim=-1) if is_softmax else torch.sigmoid(logits)
    wanted = scores if bias is None else scores + bias
    if routing.num_groups_chosen < routing.num_groups:
        wanted = _within_groups(wanted, routing)
    chosen = _best(wanted, routing.num_chosen)
    weights = scores.gather(1, chosen)
    if routing.renormalise:
        total = weights.sum(dim=-1, keepdim=True).clamp(min=routing.least_sum)
        weights = weights / total
    return weights * routing.scale if routing.scale != 1.0 else weights, chosen


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the largest, of equal ones the first: topk takes any one of equal entries."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count].contiguous()


def _within_groups(wanted: Tensor, routing: Routing) -> Tensor:
    """-inf for all experts outside the best groups."""
    groups = wanted.view(len(wanted), routing.num_groups, -1)
    of_groups = groups.sort(dim=-1, descending=True).values[..., : routing.group_best].sum(dim=-1)
    chosen = _best(of_groups, routing.num_groups_chosen)
    is_out = torch.ones_like(of_groups, dtype=torch.bool).scatter_(1, chosen, value=False)
    return groups.masked_fill(is_out.unsqueeze(-1), -torch.inf).view(wanted.shape)


def _sparsemixer(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    weights, chosen = [], []
    left = logits
    for _ in range(routing.num_chosen):
        best = _best(left, 1)
        top = left.gather(1, best)
        is_far = (top - logits) / logits.abs().clamp(min=top) > 2 * routing.jitter
        near = left.masked_fill(is_far, -torch.inf).softmax(dim=-1)
        weights.append(near.gather(1, best))
        chosen.append(best)
        left = left.scatter(1, best, -torch.inf)
    return torch.cat(weights, dim=1) * routing.scale, torch.cat(chosen, dim=1)
