from __future__ import annotations

import pytest

from sapwood.speculative.costs import FIRST_SHARE, STALE_AFTER, StepCosts


def test_without_measurements_a_token_costs_a_share_of_the_first() -> None:
    assert StepCosts().by_tokens(1, 1, 3) == [1.0, 1.0 + FIRST_SHARE, 1.0 + 2 * FIRST_SHARE]


def test_sizes_between_are_interpolated_and_beyond_grow_in_proportion() -> None:
    costs = StepCosts({1: 2.0, 3: 4.0, 4: 8.0})
    assert costs.by_tokens(1, 1, 8) == [2.0, 3.0, 4.0, 8.0, 10.0, 12.0, 14.0, 16.0]


def test_a_step_that_waited_is_not_dearer_than_a_larger_one() -> None:
    assert StepCosts({1: 2.0, 2: 50.0, 4: 6.0}).by_tokens(1, 1, 4) == [2.0, 6.0, 6.0, 6.0]


def test_steps_that_run_correct_the_shape() -> None:
    costs = StepCosts({1: 2.0, 8: 9.0})
    for _ in range(5):
        costs.observe(1, 1, 4.0)
    assert costs.by_tokens(1, 1, 8)[0] == 4.0
    assert costs.by_tokens(1, 1, 8)[-1] == 18.0, "the same correction, where nothing else is known"
    for _ in range(5):
        costs.observe(1, 8, 9.0)
    assert costs.by_tokens(1, 1, 8)[-1] == 9.0
    assert costs.by_tokens(16, 1, 1) == [2.0], "many requests are another matter"


def test_one_long_step_changes_nothing() -> None:
    costs = StepCosts({1: 2.0})
    for seconds in (2.0, 2.0, 100.0, 2.0, 2.0):
        costs.observe(1, 1, seconds)
    assert costs.by_tokens(1, 1, 1) == [2.0]


def test_old_measurements_do_not_count() -> None:
    costs = StepCosts({1: 2.0, 8: 9.0})
    costs.observe(1, 8, 90.0)
    for _ in range(STALE_AFTER):
        costs.observe(1, 1, 2.0)
    assert costs.by_tokens(1, 8, 8) == [9.0]


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_coarse_clock_tells_nothing(seconds: float) -> None:
    costs = StepCosts({1: 2.0})
    costs.observe(1, 1, seconds)
    assert costs.by_tokens(1, 1, 1) == [2.0]
