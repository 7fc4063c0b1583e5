"""Each token's expert is computed by one rank, whatever the placement."""

from __future__ import annotations

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.layers.expert_slots import ExpertSlots, SlotShare

NUM_EXPERTS = 6


@pytest.mark.parametrize("num_redundant", [0, 2, 6])
def test_one_rank_has_each_expert_of_each_token(num_redundant: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = [
        ExpertSlots(
            NUM_EXPERTS, SlotShare.of(NUM_EXPERTS, num_redundant, rank, 2), torch.device("cpu"),
            counts=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    x = torch.randn(50, 8, generator=generator)
    chosen = torch.randint(NUM_EXPERTS, (50, 2), generator=generator)
    weights = torch.rand(50, 2, generator=generator) + 0.1
    weights[3, 1] = 0.0
    for placement in (None, ranks[0].placement[::-1]):
        found = []
        for rank in ranks:
            if placement is not None:
                rank.place(placement)
            slots, own = rank.find(x, chosen, weights)
            at = torch.tensor(rank.share.own(rank.placement))
            assert torch.equal(at[slots][own > 0], chosen[own > 0])
            found.append(own)
        assert torch.equal(found[0] + found[1], weights)
        assert not bool(((found[0] > 0) & (found[1] > 0)).any())
        if num_redundant == NUM_EXPERTS:
            assert bool((found[0] > 0).any())
            assert bool((found[1] > 0).any())
    expected = 2 * torch.bincount(chosen[weights > 0], minlength=NUM_EXPERTS)
    for rank in ranks:
        assert torch.equal(rank.counts, expected)


def test_where_a_token_goes_depends_on_the_token_alone() -> None:
    slots = ExpertSlots(4, SlotShare.of(4, 4, 0, 2), torch.device("cpu"), counts=False)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    chosen = torch.arange(9).view(-1, 1) % 4
    _, together = slots.find(x, chosen, torch.ones(9, 1))
    alone = [
        slots.find(x[at : at + 1], chosen[at : at + 1], torch.ones(1, 1))[1] for at in range(9)
    ]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize(("redundant", "ranks", "why"), [(1, 2, "evenly"), (11, 3, "at most 8")])
def test_what_cannot_be_spread_is_refused(redundant: int, ranks: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        SlotShare.of(4, redundant, 0, ranks)
