"""Intervals of scores, and differences on the same questions."""

from __future__ import annotations

import pytest

from sapwood.bench.evals.scores import difference, score_of


def test_the_interval_of_a_score_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662, 0 of 20 is 0 to 0.1611.
    found = score_of([1.0] * 81 + [0.0] * 182)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    none = score_of([0.0] * 20)
    assert (none.mean, none.low, none.high) == pytest.approx((0, 0, 0.1611), abs=1e-4)


def test_a_difference_is_taken_question_by_question() -> None:
    one = {f"q{i}": float(i < 60) for i in range(100)}
    other = {f"q{i}": float(i < 50) for i in range(100)}
    found = difference(one, other)
    assert found is not None
    assert found.interval.mean == pytest.approx(0.1)
    assert (found.better, found.worse, found.num_questions) == (10, 0, 100)
    # Unpaired, the interval of 60 and 50 of 100 would hold 0.
    assert found.is_clear
    same = difference(one, one)
    assert same is not None
    assert not same.is_clear


def test_too_few_common_questions_have_no_difference() -> None:
    assert difference({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 1.0}) is None
