"""Starting a step and collecting its result, at once or from a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sapwood.schema.step import StepPlan, StepResult

Execute = Callable[[StepPlan], StepResult]


@dataclass(frozen=True, slots=True)
class Finished:
    """The handle of a step that ran when it was launched."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class SerialExecutor:
    """Runs each step when it is launched: depth 1."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute

    def launch(self, plan: StepPlan) -> Finished:
        return Finished(self._execute(plan))

    def close(self) -> None:
        return None


class OverlappedExecutor:
    """Runs steps one after the other in a thread, while the caller prepares the next one."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")

    def launch(self, plan: StepPlan) -> Future[StepResult]:
        return self._thread.submit(self._execute, plan)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
