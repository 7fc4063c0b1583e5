"""The circuit breaker as a state machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.breaker import Breaker, BreakerLimits, BreakerState

LIMITS = BreakerLimits(failures=3, successes=2, open_s=10.0)


def opened() -> Breaker:
    breaker = Breaker(LIMITS)
    for _ in range(3):
        breaker.sent()
        breaker.failed(0.0)
    return breaker


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(LIMITS)
    for outcome in "ffsff":
        breaker.sent()
        breaker.failed(0.0) if outcome == "f" else breaker.succeeded()
    assert breaker.state(0.0) is BreakerState.CLOSED
    breaker.sent()
    breaker.failed(0.0)
    assert breaker.state(0.0) is BreakerState.OPEN
    assert not breaker.admits(9.9)


def test_one_trial_at_a_time() -> None:
    breaker = opened()
    assert breaker.state(10.0) is BreakerState.HALF_OPEN
    assert breaker.admits(10.0)
    breaker.sent()
    assert not breaker.admits(11.0)
    breaker.succeeded()
    assert breaker.admits(11.0)


def test_trials_that_succeed_close_it_and_one_that_fails_opens_it() -> None:
    breaker = opened()
    for _ in range(2):
        breaker.sent()
        breaker.succeeded()
    assert breaker.state(10.0) is BreakerState.CLOSED
    breaker = opened()
    breaker.sent()
    breaker.succeeded()
    breaker.sent()
    breaker.failed(12.0)
    assert not breaker.admits(21.9)
    assert breaker.admits(22.0)


def test_what_could_not_be_reached_is_closed_when_it_answers_a_health_check() -> None:
    breaker = opened()
    assert not breaker.is_unreachable
    breaker.reached()
    assert not breaker.admits(9.9), "it fails requests, though it answers health checks"
    breaker = Breaker(LIMITS)
    for _ in range(3):
        breaker.sent()
        breaker.failed(0.0, unreachable=True)
    assert breaker.is_unreachable
    breaker.reached()
    assert breaker.admits(0.0)
    assert not breaker.is_unreachable


def test_late_answers_do_not_close_it() -> None:
    breaker = opened()
    breaker.succeeded()
    breaker.succeeded()
    assert breaker.state(0.0) is BreakerState.OPEN


def test_a_trial_that_says_nothing_makes_room_for_another() -> None:
    breaker = opened()
    breaker.sent()
    breaker.ended()
    assert breaker.admits(10.0)


def test_a_breaker_that_is_off_stays_closed() -> None:
    breaker = Breaker(BreakerLimits(failures=1, is_off=True))
    breaker.sent()
    breaker.failed(0.0)
    assert breaker.state(0.0) is BreakerState.CLOSED


@given(st.lists(st.tuples(st.sampled_from("sfe"), st.floats(0, 20)), max_size=60))
def test_a_breaker_never_stays_open_for_ever(steps: list[tuple[str, float]]) -> None:
    breaker, now_s = Breaker(LIMITS), 0.0
    for outcome, wait_s in steps:
        now_s += wait_s
        if not breaker.admits(now_s):
            continue
        breaker.sent()
        if outcome == "s":
            breaker.succeeded()
        elif outcome == "f":
            breaker.failed(now_s)
        else:
            breaker.ended()
    assert breaker.admits(now_s + LIMITS.open_s)
    for _ in range(LIMITS.successes):
        breaker.sent()
        breaker.succeeded()
    assert breaker.state(now_s) is BreakerState.CLOSED
