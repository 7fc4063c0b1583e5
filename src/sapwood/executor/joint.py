"""Steps of ranks that have requests of their own, but compute the feed-forwards together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from sapwood.schema.step import StepPlan, StepResult

R = TypeVar("R")


class JointModel(Protocol):
    def take_part(self) -> None:
        """Compute this rank's part of a step whose requests are all those of other ranks."""
        ...

    def end_step(self) -> None:
        """Compute this rank's part of what others still want of a step that this rank has run."""
        ...


def jointly(
    run: Callable[[StepPlan], R], model: JointModel, finished: Callable[[StepResult], R]
) -> Callable[[StepPlan], R]:
    """`run`, also for a step in which this rank only takes part, and until others have all that
    they want of a step.

    finished  makes of a result what `run` returns
    """

    @torch.inference_mode()
    def run_jointly(plan: StepPlan) -> R:
        if plan.is_idle:
            model.take_part()
            return finished(StepResult(step=plan.step, token_ids=[]))
        found = run(plan)
        if plan.scheduled:
            model.end_step()
        return found

    return run_jointly
