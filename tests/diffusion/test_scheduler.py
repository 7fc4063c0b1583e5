"""Turns of the scheduler of steps: who is in them, and that nothing leaks and nobody starves."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sapwood.base.clock import ManualClock
from sapwood.diffusion.scheduler import (
    MAX_PRIORITY,
    PaintingLimits,
    Phase,
    StepScheduler,
    Turn,
)
from sapwood.schema.painting import Paint


def paint(name: str, **fields: Any) -> Paint:
    return Paint(request_id=name, prompt="a tree", seed=0, **fields)


def scheduler(clock: ManualClock | None = None, **limits: int) -> StepScheduler:
    return StepScheduler(PaintingLimits(**limits), clock or ManualClock())


def ready(steps: StepScheduler, name: str, num_tokens: int, **fields: Any) -> None:
    """Take a picture in and have it prepared."""
    assert steps.add(paint(name, **fields)) is None
    while steps.state(name).phase is not Phase.DENOISING:
        prepare = steps.plan().prepare
        if prepare is not None:
            steps.prepared(prepare, num_tokens)


def test_pictures_that_fit_the_budget_share_a_step() -> None:
    steps = scheduler(max_step_tokens=100)
    for name, num_tokens in (("a", 40), ("b", 40), ("c", 40), ("d", 20)):
        ready(steps, name, num_tokens)
    first, second = steps.plan().step, steps.plan().step
    assert len(first) == 3
    assert sum(steps.state(name).num_tokens for name in first) <= 100
    assert ({*"abcd"} - {*first}) < {*second}, "who was left out goes first"


def test_a_picture_larger_than_the_budget_goes_alone_every_other_turn() -> None:
    steps = scheduler(max_step_tokens=100)
    ready(steps, "large", 1000)
    for name in ("small", "tiny"):
        ready(steps, name, 30)
    turns = [set(steps.plan().step) for _ in range(6)]
    assert turns.count({"large"}) == turns.count({"small", "tiny"}) == 3
    assert all(one != other for one, other in pairwise(turns))


def test_the_more_urgent_and_the_sooner_due_go_first() -> None:
    steps = scheduler(max_step_tokens=10, aging_turns=50)
    for name, fields in (
        ("plain", {}),
        ("due", {"timeout_s": 5.0}),
        ("urgent", {"priority": 1}),
    ):
        ready(steps, name, 10, **fields)
    assert steps.plan().step == ("urgent",)
    steps.finish("urgent")
    assert steps.plan().step == ("due",)


def test_a_full_queue_refuses_with_the_way_out() -> None:
    steps = scheduler(max_waiting=1)
    assert steps.add(paint("a")) is None
    failure = steps.add(paint("b"))
    assert failure is not None
    assert (failure.status, failure.kind) == (503, "refused")
    assert "--max-waiting-pictures" in failure.message


@pytest.mark.parametrize("priority", [MAX_PRIORITY + 1, -MAX_PRIORITY - 1])
def test_a_priority_out_of_range_is_refused(priority: int) -> None:
    failure = scheduler().add(paint("a", priority=priority))
    assert failure is not None
    assert (failure.status, failure.param) == (400, "priority")


def test_an_open_id_is_refused() -> None:
    steps = scheduler()
    assert steps.add(paint("a")) is None
    failure = steps.add(paint("a"))
    assert failure is not None
    assert failure.status == 400


def test_an_overdue_picture_is_named_in_whatever_phase() -> None:
    clock = ManualClock()
    steps = scheduler(clock, max_running=1)
    ready(steps, "running", 10, timeout_s=2.0)
    steps.add(paint("waiting", timeout_s=3.0))
    clock.advance(2.0)
    assert steps.overdue() == ["running"]
    clock.advance(1.0)
    assert steps.overdue() == ["running", "waiting"]


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=2, max_size=10),
    priorities=st.lists(st.integers(-3, 3), min_size=10, max_size=10),
)
def test_nobody_starves(sizes: list[int], priorities: list[int]) -> None:
    """However long the others run, each picture is in a step again within a bounded time."""
    steps = scheduler(max_step_tokens=100, aging_turns=2)
    names = [f"p{place}" for place in range(len(sizes))]
    for name, size, priority in zip(names, sizes, priorities, strict=False):
        ready(steps, name, size, priority=priority)
    seen = dict.fromkeys(names, 0)
    bound = 2 * (6 + 1) + 2 * len(names)  # the largest gap of priorities, and a turn for each
    for turn in range(1, 200):
        for name in steps.plan().step:
            seen[name] = turn
        assert all(turn - last <= bound for last in seen.values()), seen


class Painting(RuleBasedStateMachine):
    """Any order of arrivals, turns, ends and aborts."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.limits = PaintingLimits(
            max_running=3, max_waiting=4, max_step_tokens=100, aging_turns=2
        )
        self.steps = StepScheduler(self.limits, self.clock)
        self.open: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.num_made = 0
        self.version, self.changes = 0, 0
        self.asked_at: dict[str, int] = {}

    @rule()
    def close(self) -> None:
        """A change of the model, for pictures that come later."""
        self.steps.close()
        self.changes += 1

    @rule(size=st.integers(1, 160), num_steps=st.integers(1, 4), priority=st.integers(-2, 2))
    def arrive(self, size: int, num_steps: int, priority: int) -> None:
        name = f"r{self.num_made}"
        self.num_made += 1
        failure = self.steps.add(paint(name, priority=priority, timeout_s=50.0))
        if failure is None:
            self.open[name], self.left[name] = size, num_steps
            self.asked_at[name] = self.changes
        else:
            assert self.steps.count(Phase.WAITING) == 4

    @rule()
    def turn(self) -> None:
        while self.version < self.changes and self.steps.is_clear:
            self.steps.reopen()
            self.version += 1
        turn = self.steps.plan()
        for name in (turn.prepare, *turn.step, turn.decode):
            assert name is None or self.asked_at[name] == self.version, "drawn as it was asked"
        self._check(turn)
        if turn.prepare is not None:
            self.steps.prepared(turn.prepare, self.open[turn.prepare])
        for name in turn.step:
            self.left[name] -= 1
            if self.left[name] == 0:
                self.steps.denoised(name)
        if turn.decode is not None:
            self._end(turn.decode)

    @precondition(lambda self: bool(self.open))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(sorted(self.open))))

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        for name in self.steps.overdue():
            self._end(name)

    def _end(self, name: str) -> None:
        assert self.steps.finish(name) is not None
        assert self.steps.finish(name) is None
        del self.open[name], self.left[name]

    def _check(self, turn: Turn) -> None:
        assert len(set(turn.step)) == len(turn.step)
        assert all(self.steps.state(name).phase is Phase.DENOISING for name in turn.step)
        assert sum(self.open[name] for name in turn.step) <= 100 or len(turn.step) == 1
        assert turn.step or not self.steps.count(Phase.DENOISING), "a turn does what it can"

    @invariant()
    def nothing_is_lost_and_nothing_leaks(self) -> None:
        assert set(self.steps.open_ids) == set(self.open)
        assert len(self.open) - self.steps.count(Phase.WAITING) <= self.limits.max_running

    def teardown(self) -> None:
        """Everything that is open ends, within the turns that all its work needs."""
        for _ in range(sum(self.left.values()) + 3 * len(self.open) + 1):
            self.turn()
        assert not self.open
        assert not self.steps.has_work


TestPainting = Painting.TestCase
TestPainting.settings = settings(deadline=None, max_examples=50, stateful_step_count=30)
