"""Stages of a pretend model that work through their plans at their own pace."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sapwood.executor.inputs import ONE_GROUP
from sapwood.executor.rows import RowTable
from sapwood.executor.stage_runner import StageRunner
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import StepPlan, StepResult
from tests.executor.hashing_model import HashingModel, make_pages

CPU = torch.device("cpu")


class HashingStage(HashingModel):
    """Checks that the stage before found the same context in its own pages, and tells the next."""

    def __init__(self, before: deque[Tensor] | None) -> None:
        self._before = before
        self.sent: deque[Tensor] = deque()

    def forward(self, batch: ForwardBatch) -> Tensor:
        found = super().forward(batch)
        if self._before is not None:
            assert torch.equal(found, self._before.popleft()), "stages computed other contexts"
        self.sent.append(found)
        return found


@dataclass(eq=False)
class Late:
    """A step of the last stage that computes when it is asked for."""

    pipeline: SimulatedPipeline
    plan: StepPlan

    def result(self) -> StepResult:
        return self.pipeline.result_of(self.plan)


@dataclass(eq=False)
class SimulatedPipeline:
    """Several stages; the last one, which `execute` computes, runs as late as possible.

    The others run ahead by as many plans as chance wants."""

    model: HashingStage
    stages: list[tuple[StageRunner, deque[StepPlan]]]
    rng: random.Random
    execute: Callable[[StepPlan], StepResult] | None = None
    _waiting: deque[StepPlan] = field(default_factory=deque)
    _results: dict[int, StepResult] = field(default_factory=dict)

    @staticmethod
    def of(
        num_stages: int, seed: int, *, num_rows: int, max_pages: int, num_pages: int, page_size: int
    ) -> SimulatedPipeline:
        model, stages = HashingStage(None), []
        for _ in range(num_stages - 1):
            runner = StageRunner(
                model,
                kv_caches=make_pages(num_pages, page_size),
                rows=RowTable(num_rows=num_rows, max_pages=max_pages, device=CPU),
                page_size=page_size,
                device=CPU,
                places=ONE_GROUP,
            )
            stages.append((runner, deque[StepPlan]()))
            model = HashingStage(model.sent)
        return SimulatedPipeline(model, stages, random.Random(seed))

    def launch(self, plan: StepPlan) -> Late:
        self._waiting.append(plan)
        for _, plans in self.stages:
            plans.append(plan)
        self._run_ahead(until=None)
        return Late(self, plan)

    def result_of(self, plan: StepPlan) -> StepResult:
        assert self.execute is not None
        while plan.step not in self._results:
            nearest = self._waiting.popleft()
            self._run_ahead(until=nearest)
            self._results[nearest.step] = self.execute(nearest)
        return self._results.pop(plan.step)

    def _run_ahead(self, until: StepPlan | None) -> None:
        """Let each stage run some of its plans, all up to `until` among them; none may overtake the
        stage before it."""
        left_before = 0
        for runner, plans in self.stages:
            least = 0 if until is None or until not in plans else plans.index(until) + 1
            for _ in range(self.rng.randint(least, len(plans) - left_before)):
                runner.execute(plans.popleft())
            left_before = len(plans)
