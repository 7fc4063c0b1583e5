"""Where experts go: each has a place, and the busiest rank never gets more to compute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sapwood.layers.expert_balance import balanced, busiest
from sapwood.layers.expert_slots import first_placement


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(load of each expert, slots of all ranks, ranks)"""
    num_ranks = draw(st.integers(2, 6))
    per_rank = draw(st.integers(1, 8))
    num_experts = draw(st.integers(per_rank, num_ranks * per_rank))
    loads = draw(st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts))
    return loads, num_ranks * per_rank, num_ranks


@given(layer=layers(), later=st.randoms(use_true_random=False))
def test_every_expert_has_a_place_and_no_rank_gets_busier(
    layer: tuple[list[int], int, int], later: object
) -> None:
    loads, num_slots, num_ranks = layer
    placement = first_placement(len(loads), num_slots)
    size = num_slots // num_ranks
    for _ in range(3):
        then = balanced(placement, loads, num_ranks)
        assert set(then) == set(range(len(loads)))
        assert len(then) == num_slots
        for first in range(0, num_slots, size):
            own = then[first : first + size]
            assert len(set(own)) == size, "a rank has an expert twice"
        assert busiest(then, loads, num_ranks) <= busiest(placement, loads, num_ranks)
        if busiest(then, loads, num_ranks) == busiest(placement, loads, num_ranks):
            assert then == placement, "a move that gains nothing"
        placement = then
        later.shuffle(loads)  # type: ignore[attr-defined]


def test_two_experts_that_all_tokens_choose_are_parted() -> None:
    assert busiest((0, 1, 2, 3), [9, 9, 1, 1], 2) == 18
    then = balanced((0, 1, 2, 3), [9, 9, 1, 1], 2)
    assert busiest(then, [9, 9, 1, 1], 2) == 10
    assert sum(now != new for now, new in zip((0, 1, 2, 3), then, strict=True)) == 2


def test_a_redundant_expert_is_the_one_with_the_most_tokens() -> None:
    before, loads = first_placement(4, 6), [2, 2, 2, 12]
    assert busiest(before, loads, 2) == 14
    then = balanced(before, loads, 2)
    assert then.count(3) == 2
    assert busiest(then, loads, 2) == 9
