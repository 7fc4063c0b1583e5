"""Starting a step and collecting its result: at once, from a thread, or from a device's queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sapwood.schema.step import StepHandle, StepPlan, StepResult

Execute = Callable[[StepPlan], StepResult]
T = TypeVar("T")


class LaunchedStep(StepHandle, Protocol):
    def done(self) -> bool:
        """Whether its tokens are on the host, so that `result` need not wait for the device."""
        ...


Launch = Callable[[StepPlan], LaunchedStep]


@dataclass(frozen=True, slots=True)
class Finished:
    """The handle of a step that ran when it was launched."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value

    def done(self) -> bool:
        return True


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
        own: SerialExecutor | OverlappedExecutor | OverlappedLaunches | QueuedExecutor,
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


class _Thread:
    """Does what it is given, one thing after the other.

    A daemon thread of its own and not a pool of threads: a pool takes no more work once the
    interpreter has begun to end, and a stream that is still open then would fail.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], T]) -> Future[T]:
        found: Future[T] = Future()

        def do() -> None:
            try:
                found.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised where the result is wanted
                found.set_exception(error)

        self._work.put(do)
        return found

    def close(self) -> None:
        """Wait until all is done, and end the thread. May be called twice."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class OverlappedExecutor:
    """Runs steps one after the other in a thread, while the caller prepares the next one."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._thread = _Thread()

    def launch(self, plan: StepPlan) -> Future[StepResult]:
        return self._thread.do(lambda: self._execute(plan))

    def close(self) -> None:
        """Wait for the steps that were launched, and end the thread. May be called twice."""
        self._thread.close()


class OverlappedLaunches:
    """Launches steps one after the other in a thread, while the caller prepares the next one: for a
    device with a queue, where some launches wait for it.

    A step that is still in the queue when its launch has ended is waited for in the same thread, as
    nothing else may use the runner meanwhile."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._thread = _Thread()

    def launch(self, plan: StepPlan) -> StepHandle:
        return _Launching(self._thread, self._thread.do(lambda: self._launch(plan)))

    def close(self) -> None:
        """Wait for the launches, and end the thread. May be called twice."""
        self._thread.close()


@dataclass(frozen=True, slots=True)
class _Launching:
    """A step whose launch is done in a thread."""

    thread: _Thread
    launched: Future[LaunchedStep]

    def result(self) -> StepResult:
        step = self.launched.result()
        if step.done():
            return step.result()
        return self.thread.do(step.result).result()
