"""Measuring steps before the first request."""

from __future__ import annotations

from sapwood.executor.warmup import NUM_MEASURED, measure_steps
from sapwood.schema.step import StepPlan, StepResult


class Rank:
    """Remembers the plans that it is given."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return StepResult(step=plan.step, token_ids=[[0]])


def test_each_size_is_measured_in_pages_of_its_own() -> None:
    rank = Rank()
    found = measure_steps(rank.execute, [1, 4, 9], page_size=4, num_windows=1, slot=0)
    assert list(found) == [1, 4, 9]
    assert all(seconds >= 0.0 for seconds in found.values())
    assert [len(plan.starts) for plan in rank.plans] == [1] + [0] * (3 * NUM_MEASURED)
    sizes = [entry.num_new for plan in rank.plans[1:] for entry in plan.scheduled]
    assert sizes == sorted([1, 4, 9] * NUM_MEASURED)
    [entry] = rank.plans[-1].scheduled
    assert entry.pages == [0, 1, 2]
    assert entry.windows == [(0, [0, 1, 2])]
    assert entry.slot == 0
    assert len(entry.draft_ids) == 8


def test_slow_sizes_are_left_out_but_never_the_first() -> None:
    rank = Rank()
    assert list(measure_steps(rank.execute, [1, 2, 4], page_size=16, most_s=-1.0)) == [1]
