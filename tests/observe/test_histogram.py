import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.observe.histogram import Histogram, LatencyWindow, distribution


def test_an_observation_falls_at_or_under_its_bound():
    histogram = Histogram([1, 2, 4])
    for value in (0.5, 1, 1.5, 4, 100):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1, 1]
    assert histogram.total == 107
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 3), ("4.0", 4), ("+Inf", 5)]


def test_one_observation_may_count_several_times():
    histogram = Histogram([1])
    histogram.observe(0.25, 4)
    assert (histogram.counts, histogram.total) == ([4, 0], 1.0)


@given(st.lists(st.floats(0, 100), max_size=50))
def test_a_distribution_counts_every_value_once(values):
    rows = distribution(values, (1, 5, 50))
    assert sum(count for _, _, count in rows) == len(values)
    assert [(gt, le) for gt, le, _ in rows] == [
        ("-Inf", "1.0"),
        ("1.0", "5.0"),
        ("5.0", "50.0"),
        ("50.0", "+Inf"),
    ]
    for gt, le, count in rows:
        low = -math.inf if gt == "-Inf" else float(gt)
        assert count == sum(low < value <= float(le) for value in values)


@given(st.lists(st.floats(2e-5, 1000), min_size=1, max_size=200))
def test_percentiles_are_within_a_few_percent(durations):
    window = LatencyWindow(3)
    for duration in durations:
        window.observe(duration)
    ordered = sorted(durations)
    for share in (0.5, 0.95, 0.99):
        exact = ordered[math.ceil(share * len(ordered)) - 1]
        [found] = window.percentiles([share])
        assert found == pytest.approx(exact, rel=0.03)


def test_what_is_older_than_the_window_is_forgotten():
    window = LatencyWindow(2)
    assert window.percentiles([0.5]) == [None]
    window.observe(1.0, 1000)
    window.tick()
    window.observe(0.001)
    assert window.percentiles([0.5])[0] == pytest.approx(1.0, rel=0.03)
    window.tick()
    assert window.percentiles([0.5])[0] == pytest.approx(0.001, rel=0.03)
    window.tick()
    assert window.percentiles([0.5, 0.9]) == [None, None]


def test_extremes_are_kept_in_the_first_and_the_last_bucket():
    window = LatencyWindow(2)
    window.observe(0.0)
    window.observe(1e9)
    low, high = window.percentiles([0.5, 1.0])
    assert low == pytest.approx(1e-5)
    assert high > 1000
