from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.bench.scheduler import SchedulerOptions, cost_table, measure_growth


def test_one_row_per_size_with_all_requests_running() -> None:
    costs = measure_growth(SchedulerOptions(running="1, 4", waiting=3, steps=10))
    assert [cost.num_running for cost in costs] == [1, 4]
    assert all(0 < cost.median_s <= cost.p99_s for cost in costs)
    assert cost_table(costs).row_count == 2


@pytest.mark.parametrize("running", ["", "0", "1,x", "-3"])
def test_sizes_that_make_no_sense(running: str) -> None:
    with pytest.raises(ConfigError, match="--running"):
        measure_growth(SchedulerOptions(running=running))
