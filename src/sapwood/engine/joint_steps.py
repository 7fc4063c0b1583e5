"""Which steps engines that share feed-forwards compute together, each with its own requests.

Every engine takes part in every step: with its own plan if it has one, else with nothing. An engine
that begins a step tells the others the step's number, unless one of them has told it already. So
an engine without requests sleeps until it hears of a step, and none waits for another that does
not know of the step.
"""

from __future__ import annotations

from collections.abc import Callable

from sapwood.schema.request import EngineEnds, StepBegun


class JointSteps:
    """One engine's view of the steps of all."""

    def __init__(self, tell: Callable[[StepBegun | EngineEnds], None], num_others: int) -> None:
        """tell: sends a message to all other engines, and waits for nothing"""
        self._tell = tell
        self._num_others = num_others
        self._num_begun = 0
        self._num_announced = 0
        self._num_ended = 0
        self._has_said_end = False

    def begin(self) -> None:
        """This engine launches its next step."""
        self._num_begun += 1
        if self._num_begun > self._num_announced:
            self._num_announced = self._num_begun
            self._tell(StepBegun(self._num_begun))

    @property
    def is_awaited(self) -> bool:
        """Whether another engine has begun a step that this one has not."""
        return self._num_begun < self._num_announced

    def on_begun(self, message: StepBegun) -> None:
        self._num_announced = max(self._num_announced, message.number)

    def on_ends(self, _: EngineEnds) -> None:
        self._num_ended += 1

    def may_end(self) -> bool:
        """Whether no engine needs this one any more; called once this engine has no requests and
        gets none."""
        if not self._has_said_end:
            self._has_said_end = True
            self._tell(EngineEnds())
        return self._num_ended == self._num_others and not self.is_awaited
