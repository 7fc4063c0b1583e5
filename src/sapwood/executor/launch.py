"""Starting a step and collecting its result: at once, from a thread, or from a device's queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from sapwood.schema.step import StepHandle, StepPlan, StepResult

Execute = Callable[[StepPlan], StepResult]
Launch = Callable[[StepPlan], StepHandle]


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


class QueuedExecutor:
    """Queues steps on a device, which works through its queue while the caller goes on."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def launch(self, plan: StepPlan) -> StepHandle:
        return self._launch(plan)

    def close(self) -> None:
        return None


class TeamExecutor:
    """Has the other ranks compute each step, too."""

    def __init__(
        self,
        own: SerialExecutor | OverlappedExecutor | QueuedExecutor,
        tell: Callable[[StepPlan], None],
    ) -> None:
        """own: of this rank; tell: sends a plan to all others, and waits for nothing"""
        self._own = own
        self._tell = tell

    def launch(self, plan: StepPlan) -> StepHandle:
        self._tell(plan)
        return self._own.launch(plan)

    def close(self) -> None:
        self._own.close()


class OverlappedExecutor:
    """Runs steps one after the other in a thread, while the caller prepares the next one.

    A daemon thread of its own and not a pool of threads: a pool takes no more work once the
    interpreter has begun to end, and a stream that is still open then would fail.
    """

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._steps: queue.SimpleQueue[tuple[StepPlan, Future[StepResult]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, name="step", daemon=True)
        self._thread.start()

    def launch(self, plan: StepPlan) -> Future[StepResult]:
        result: Future[StepResult] = Future()
        self._steps.put((plan, result))
        return result

    def close(self) -> None:
        """Wait for the steps that were launched, and end the thread. May be called twice."""
        self._steps.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (step := self._steps.get()) is not None:
            plan, result = step
            try:
                result.set_result(self._execute(plan))
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is wanted
                result.set_exception(error)
