"""Sends tokens to the ranks that have their experts, and brings back what the experts give.

For ranks with requests of their own. A rank gets only the tokens that chose one of its experts,
each once, however many of its experts the token chose.

Source: dispatch and combine as in Lepikhin et al. 2020, arXiv:2006.16668, without a capacity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sapwood.distributed.groups import Group

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""As PackedExperts."""


class ExpertExchange(Protocol):
    """All ranks call it for the same layer at the same time, also a rank without tokens."""

    def __call__(
        self, x: Tensor, slots: Tensor, weights: Tensor, mix: Mix, *, num_own: int
    ) -> Tensor:
        """x [T, size] -> [T, size]: for each token the weighted sum over its experts, wherever they
        are; partial sums of ranks are added in fp32, in the ranks' order.

        slots    [T, k] int64: the slot that has each chosen expert, among those of all ranks
        weights  [T, k] fp32; an expert of weight 0 is not asked
        mix      computes what this rank's experts give for the rows that come to it
        num_own  slots of each rank
        """
        ...


class GroupExchange:
    """An `ExpertExchange` over a group: in shared memory, over gloo or NCCL."""

    def __init__(self, group: Group, counting: Group) -> None:
        """group     the ranks over which experts are spread, each with whole experts
        counting  the same ranks, which exchange numbers in the host's memory"""
        self._group = group
        self._counting = counting

    def __call__(
        self, x: Tensor, slots: Tensor, weights: Tensor, mix: Mix, *, num_own: int
    ) -> Tensor:
        ranks, slots = slots // num_own, slots % num_own
        every = torch.arange(self._group.size, device=x.device)
        asks = ((ranks[..., None] == every) & (weights != 0)[..., None]).any(dim=1)
        to, rows = asks.t().nonzero(as_tuple=True)
        counts = self._counted(asks)
        is_there = ranks[rows] == to[:, None]
        received = self._group.all_to_all(
            _as_bytes(
                x[rows],
                slots[rows].masked_fill(~is_there, 0).to(torch.int32),
                weights[rows].masked_fill(~is_there, 0.0),
            ),
            counts,
        )
        given = self._given(received, x, weights.shape[1], mix)
        total = torch.zeros_like(x, dtype=torch.float32)
        start = 0
        own_counts = counts[self._group.rank].tolist()
        given = self._group.all_to_all(given, counts.t())
        for count in own_counts:  # a rank at a time: no token occurs twice then
            part = slice(start, start + count)
            total.index_add_(0, rows[part], given[part].float())
            start += count
        return total.to(x.dtype)

    def _counted(self, asks: Tensor) -> Tensor:
        """asks [T, ranks] of this rank -> rows [ranks, ranks] that each rank sends to each"""
        own = asks.sum(dim=0)[None].cpu()
        return self._counting.all_gather(own).view(self._group.size, self._group.size)

    @staticmethod
    def _given(received: Tensor, x: Tensor, num_chosen: int, mix: Mix) -> Tensor:
        """What this rank's experts give for rows of `_as_bytes`, [rows, size]."""
        if not len(received):
            return x.new_empty(0, x.shape[1])
        sizes = [x.shape[1] * x.itemsize, 4 * num_chosen, 4 * num_chosen]
        parts = torch.split(received, sizes, dim=1)
        taken, slots, weights = (part.contiguous() for part in parts)
        return mix(taken.view(x.dtype), slots.view(torch.int32).long(), weights.view(torch.float32))


def _as_bytes(*parts: Tensor) -> Tensor:
    """Rows of several tensors side by side, so that they go to other ranks in one piece."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
