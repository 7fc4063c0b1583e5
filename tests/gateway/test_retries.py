"""When a request is sent again."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.retries import MAX_SAVED_RETRIES, RetryBudget, RetryLimits


@given(st.integers(0, 10_000), st.integers(0, 99))
def test_waits_grow_and_have_a_limit(num_retries: int, seed: int) -> None:
    limits = RetryLimits()
    wait_s = limits.backoff_s(num_retries, random.Random(seed))
    wanted = 0.05 * 1.5 ** min(num_retries, 50)
    assert min(0.8 * wanted, 24.0) <= wait_s <= min(1.2 * wanted, 30.0) + 1e-9


def test_retries_are_a_share_of_requests() -> None:
    budget = RetryBudget(0.5)
    for _ in range(int(MAX_SAVED_RETRIES)):
        assert budget.take_retry()
    assert not budget.take_retry()
    budget.add_request()
    assert not budget.take_retry()
    budget.add_request()
    assert budget.take_retry()
    for _ in range(1000):
        budget.add_request()
    assert sum(budget.take_retry() for _ in range(1000)) == MAX_SAVED_RETRIES
