import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.bench.distribution import Distribution, Spread, percentile


def test_percentiles_interpolate():
    values = [float(value) for value in range(1, 101)]
    summary = Distribution.of(list(reversed(values)))
    assert summary is not None
    assert summary.mean == 50.5
    assert summary.median == 50.5
    assert summary.p95 == pytest.approx(95.05)
    assert summary.p99 == pytest.approx(99.01)
    assert (summary.minimum, summary.maximum, summary.count) == (1.0, 100.0, 100)


def test_nothing_has_no_distribution():
    assert Distribution.of([]) is None
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_percentiles_are_ordered(values):
    ordered = sorted(values)
    points = [percentile(ordered, percent) for percent in (0, 50, 95, 99, 100)]
    assert points == sorted(points)
    assert (points[0], points[-1]) == (ordered[0], ordered[-1])


def test_spread_quotes_the_median():
    spread = Spread.of([3.0, 1.0, 100.0])
    assert (spread.median, spread.minimum, spread.maximum) == (3.0, 1.0, 100.0)
