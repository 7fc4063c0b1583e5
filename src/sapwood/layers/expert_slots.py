"""Which rank has which experts of a layer, and which copy of an expert a token goes to.

Every rank has equally many slots, with an expert in each. With redundant experts there are more
slots than experts, so that an expert that many tokens choose is on several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError


def first_placement(num_experts: int, num_slots: int) -> tuple[int, ...]:
    """The expert of each slot before any load is known: in turn, over and over."""
    return tuple(slot % num_experts for slot in range(num_slots))


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotShare:
    """The slots of one rank among those of all ranks.

    num_slots  of all ranks together
    first      slot of this rank, of `num_own`
    """

    num_slots: int
    first: int
    num_own: int

    @staticmethod
    def of(num_experts: int, num_redundant: int, ep_rank: int, ep_size: int) -> SlotShare:
        """The share of one of `ep_size` ranks; ConfigError if the slots cannot be shared evenly, or
        a rank would have an expert twice."""
        num_slots = num_experts + num_redundant
        if num_slots % ep_size:
            raise ConfigError(
                f"the model's {num_experts} experts and {num_redundant} redundant ones cannot be "
                f"spread evenly over {ep_size} ranks; choose another --ep-size or "
                "--ep-num-redundant-experts"
            )
        num_own = num_slots // ep_size
        if num_own > num_experts:
            raise ConfigError(
                f"--ep-num-redundant-experts is {num_redundant}, with which each of {ep_size} "
                f"ranks would have {num_own} experts, but the model has {num_experts}; give at "
                f"most {num_experts * (ep_size - 1)}"
            )
        return SlotShare(num_slots=num_slots, first=ep_rank * num_own, num_own=num_own)

    def own(self, placement: Sequence[int]) -> tuple[int, ...]:
        """The experts in this rank's slots."""
        return tuple(placement[self.first : self.first + self.num_own])


class ExpertSlots:
    """Finds this rank's experts of tokens, and counts what tokens choose.

    placement  the expert of each slot, over all ranks
    counts     [num_experts] int64: how often each was chosen since `counts` was last set to 0
    """

    def __init__(
        self, num_experts: int, share: SlotShare, device: torch.device, *, counts: bool
    ) -> None:
        self.share = share
        self._num_experts = num_experts
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device) if counts else None
        self._device = device
        self.place(first_placement(num_experts, share.num_slots))

    @property
    def has_all(self) -> bool:
        """Whether this rank has every expert, each in the slot of its number."""
        return self.share.num_own == self._num_experts == self.share.num_slots

    def place(self, placement: Sequence[int]) -> None:
        """Look experts up in these slots from now on."""
        slots: list[list[int]] = [[] for _ in range(self._num_experts)]
        for slot, expert in enumerate(placement):
            slots[expert].append(slot)
        most = max(map(len, slots))
        table = [[of[copy % len(of)] for copy in range(most)] for of in slots]
        self.placement = tuple(placement)
        self._slots = torch.tensor(table, device=self._device)
        own = self._slots - self.share.first
        self._own_slots = own.masked_fill((own < 0) | (own >= self.share.num_own), -1)
        self._num_copies = torch.tensor([len(of) for of in slots], device=self._device)

    def find(self, x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(slots of this rank [T, k], weights [T, k]); those of other ranks have weight 0.

        x        [T, hidden]: what the router was given
        chosen   [T, k] int64, experts
        weights  [T, k] fp32
        """
        self._count(chosen, weights)
        if self.has_all:
            return chosen, weights
        own = self._looked_up(self._own_slots, x, chosen)
        is_elsewhere = own < 0
        return own.masked_fill(is_elsewhere, 0), weights.masked_fill(is_elsewhere, 0.0)

    def find_everywhere(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The slot of each choice [T, k], among those of all ranks; parameters as in `find`."""
        self._count(chosen, weights)
        return self._looked_up(self._slots, x, chosen)

    def _count(self, chosen: Tensor, weights: Tensor) -> None:
        if self.counts is not None:
            self.counts.scatter_add_(0, chosen.flatten(), (weights != 0).long().flatten())

    def _looked_up(self, table: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
        """The entry of a table [experts, copies] for each choice."""
        if table.shape[1] == 1:
            return table[chosen, 0]
        return table[chosen, _key_of(x) % self._num_copies[chosen]]


def _key_of(x: Tensor) -> Tensor:
    """[T, 1]: a number of each token from its own input alone, so that the choice among copies, and
    with it rounding, does not depend on what else is in a step: bits of a bfloat16's fraction."""
    bits = x[:, :1].float().contiguous().view(torch.int32)
    return ((bits >> 16) & 0x7F).long()


class Movable(Protocol):
    """A layer whose experts can change places, as layers/experts.Experts."""

    slots: ExpertSlots

    @property
    def can_be_captured(self) -> bool:
        """As PackedExperts, once its weights are placed."""
        ...

    def plan_move(self, placement: Sequence[int]) -> None: ...

    def settle(self) -> None: ...

    def cancel(self) -> None: ...


class MovableExperts:
    """The layers of experts of a model, in the order in which they were built.

    counts  whether they count which experts tokens choose"""

    def __init__(self, *, counts: bool) -> None:
        self.counts = counts
        self.layers: list[Movable] = []

    def add(self, layer: Movable) -> None:
        self.layers.append(layer)
