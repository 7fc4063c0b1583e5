from __future__ import annotations

import pytest

from sapwood.app.serving.supervision import MAX_DELAY_S, RestartPolicy


def test_each_restart_waits_twice_as_long_up_to_a_limit() -> None:
    policy = RestartPolicy(max_restarts=10, window_s=1000)
    delays = [policy.delay_s([0.0] * count, 1.0) for count in range(10)]
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == MAX_DELAY_S


def test_only_restarts_within_the_window_count() -> None:
    policy = RestartPolicy(max_restarts=2, window_s=100)
    assert policy.delay_s([0.0, 50.0], 99.0) is None
    assert policy.delay_s([0.0, 50.0], 100.0) == pytest.approx(1.0)
    assert policy.delay_s([0.0, 50.0], 150.0) == pytest.approx(0.5)
