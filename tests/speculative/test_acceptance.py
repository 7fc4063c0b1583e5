from __future__ import annotations

import pytest

from sapwood.speculative.acceptance import PRIOR_RATE, Acceptance
from sapwood.speculative.interface import Guesses


def test_rates_are_those_of_what_was_observed() -> None:
    common = Acceptance(memory=0.999)
    for number in range(2000):
        common.observe(1, is_right=number % 4 != 0)
    assert common.rate(1) == pytest.approx(0.75, abs=0.01)
    assert common.rate(2) == PRIOR_RATE


def test_one_request_begins_with_the_rates_of_all_and_then_has_its_own() -> None:
    common = Acceptance(memory=0.999)
    mine = Acceptance(memory=0.9, prior=common)
    yours = Acceptance(memory=0.9, prior=common)
    for _ in range(500):
        yours.observe(1, is_right=True)
    assert mine.rate(1) > 0.95
    for _ in range(20):
        mine.observe(1, is_right=False)
    assert mine.rate(1) < 0.4 < 0.95 < yours.rate(1)


def test_a_chain_is_compared_up_to_its_first_mistake() -> None:
    found = Acceptance(memory=0.5)
    found.learn(Guesses(token_ids=[5, 6, 7, 8], kinds=[0, 1, 2, 3]), [5, 6, 9, 8])
    assert found.rate(0) == found.rate(1) > PRIOR_RATE > found.rate(2)
    assert found.rate(3) == PRIOR_RATE
    found.learn(Guesses(token_ids=[5, 6], kinds=[4, 5]), [5])
    assert found.rate(4) > PRIOR_RATE == found.rate(5)


TREE = Guesses(token_ids=[1, 2, 3, 4], kinds=[0, 1, 2, 3], parents=[-1, 0, -1, 2])


def test_a_tree_is_compared_along_the_way_that_was_right() -> None:
    found = Acceptance(memory=0.5)
    found.learn(TREE, [3, 9])
    assert found.rate(0) == found.rate(3) < PRIOR_RATE < found.rate(2)
    assert found.rate(1) == PRIOR_RATE, "nobody knows whether it was right"
    found.learn(TREE, [1])
    assert found.rate(1) == PRIOR_RATE
    assert found.rate(2) > PRIOR_RATE, "a sibling after the right one is not asked"


def test_siblings_share_one_chance() -> None:
    rates = Acceptance(memory=0.5)
    first, left = PRIOR_RATE, 1 - PRIOR_RATE
    expected = [first, first**2, left * first, left * first**2]
    assert rates.survivals(TREE) == pytest.approx(expected)


def test_a_guess_survives_with_those_before_it() -> None:
    rates = Acceptance(memory=0.5)
    guesses = Guesses(token_ids=[1, 2, 3], kinds=[0, 1, 0])
    expected = [PRIOR_RATE, PRIOR_RATE**2, PRIOR_RATE**3]
    assert rates.survivals(guesses) == pytest.approx(expected)
    assert rates.survivals(Guesses()) == []
