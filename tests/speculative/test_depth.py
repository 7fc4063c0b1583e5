from __future__ import annotations

from sapwood.speculative.costs import StepCosts
from sapwood.speculative.depth import TRIED_EVERY, DraftDepth

FLAT = dict.fromkeys((1, 2, 4, 8, 16), 1.0)
RIGHT = [0.9, 0.81, 0.73, 0.66]


def depth_at(seconds: float, costs: dict[int, float] = FLAT) -> DraftDepth:
    depth = DraftDepth(StepCosts(costs))
    depth.observe(1, 1, seconds)
    return depth


def test_cheap_guesses_go_deep_and_dear_ones_do_not() -> None:
    assert depth_at(0.01).best([RIGHT], 1) == 4
    assert depth_at(0.6).best([RIGHT], 1) == 2
    assert depth_at(2.0).best([RIGHT], 1) == 0


def test_wrong_guesses_are_not_asked_for() -> None:
    assert depth_at(0.1).best([[0.05, 0.003]], 1) == 0


def test_busy_steps_get_none() -> None:
    """Where each token of a step costs as much as the first, nothing is gained."""
    assert depth_at(0.01, {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}).best([RIGHT], 1) == 0


def test_before_a_guess_was_timed_all_are_asked_for() -> None:
    assert DraftDepth(StepCosts(FLAT)).best([RIGHT, RIGHT[:2]], 2) == 4


def test_now_and_then_a_guess_is_tried() -> None:
    depth = depth_at(2.0)
    asked = [depth.best([RIGHT], 1) for _ in range(2 * TRIED_EVERY)]
    assert sum(asked) == 2


def test_nothing_is_asked_for_where_nobody_may_have_guesses() -> None:
    assert depth_at(0.01).best([], 4) == 0


def test_trees_cost_more_to_verify() -> None:
    costs = StepCosts({1: 1.0, 2: 1.3, 4: 1.9, 8: 3.1, 16: 5.5})
    chain, tree = DraftDepth(costs), DraftDepth(costs, breadth=3)
    for depth in (chain, tree):
        depth.observe(1, 1, 0.01)
    assert chain.best([RIGHT], 1) > tree.best([RIGHT], 1)
