from __future__ import annotations

import threading

import pytest

from sapwood.executor.launch import OverlappedExecutor, OverlappedLaunches, SerialExecutor
from sapwood.schema.step import StepPlan, StepResult


def plan(step: int) -> StepPlan:
    return StepPlan(step=step, starts=[], scheduled=[])


def echo(one: StepPlan) -> StepResult:
    return StepResult(step=one.step, token_ids=[[one.step * 10]])


def fail(one: StepPlan) -> StepResult:
    raise RuntimeError(f"step {one.step} failed")


def test_a_serial_step_has_run_when_it_was_launched() -> None:
    ran: list[int] = []

    def execute(one: StepPlan) -> StepResult:
        ran.append(one.step)
        return echo(one)

    executor = SerialExecutor(execute)
    handle = executor.launch(plan(3))
    assert ran == [3]
    assert handle.result().token_ids == [[30]]
    executor.close()


def test_overlapped_steps_run_in_order_beside_the_caller() -> None:
    may_run = threading.Event()
    ran: list[int] = []
    threads: set[int] = set()

    def execute(one: StepPlan) -> StepResult:
        assert may_run.wait(10)
        ran.append(one.step)
        threads.add(threading.get_ident())
        return echo(one)

    executor = OverlappedExecutor(execute)
    handles = [executor.launch(plan(step)) for step in range(4)]
    assert ran == []
    may_run.set()
    assert [handle.result().token_ids for handle in handles] == [[[0]], [[10]], [[20]], [[30]]]
    assert ran == [0, 1, 2, 3]
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    executor.close()
    executor.close()


class Queued:
    """A step in a device's queue, as each even one is; an odd one was waited for when launched."""

    def __init__(self, one: StepPlan, did: list[tuple[str, int, int]]) -> None:
        self.one = one
        self.did = did
        self._do("launch")

    def done(self) -> bool:
        return self.one.step % 2 == 1

    def result(self) -> StepResult:
        if not self.done():
            self._do("wait")
        return echo(self.one)

    def _do(self, what: str) -> None:
        self.did.append((what, self.one.step, threading.get_ident()))


def test_launches_and_waits_are_made_in_one_thread() -> None:
    did: list[tuple[str, int, int]] = []
    executor = OverlappedLaunches(lambda one: Queued(one, did))
    first, second = executor.launch(plan(0)), executor.launch(plan(1))
    assert second.result().token_ids == [[10]]
    assert [what for what, _, _ in did] == ["launch", "launch"]
    assert first.result().token_ids == [[0]]
    assert [(what, step) for what, step, _ in did] == [("launch", 0), ("launch", 1), ("wait", 0)]
    assert len({thread for _, _, thread in did} - {threading.get_ident()}) == 1
    executor.close()


@pytest.mark.parametrize("kind", [SerialExecutor, OverlappedExecutor, OverlappedLaunches])
def test_what_a_step_raises_comes_to_whoever_wants_its_result(kind: type) -> None:
    executor = kind(fail)
    with pytest.raises(RuntimeError, match="step 2 failed"):
        executor.launch(plan(2)).result()
    executor.close()


def test_closing_waits_for_the_step_that_runs() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def execute(one: StepPlan) -> StepResult:
        begun.set()
        assert may_end.wait(10)
        return echo(one)

    executor = OverlappedExecutor(execute)
    handle = executor.launch(plan(1))
    assert begun.wait(10)
    closing = threading.Thread(target=executor.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    may_end.set()
    closing.join(10)
    assert not closing.is_alive()
    assert handle.result().token_ids == [[10]]
