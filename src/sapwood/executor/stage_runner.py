"""Executes plans on a rank of a stage that another one follows: it chooses no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.inputs import build_inputs
from sapwood.executor.rows import RowTable
from sapwood.executor.step_adapters import StepAdapterPool, change_slots, knowing_adapters
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import StepPlan, StepResult


class StageModel(Protocol):
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Compute the stage's layers, write their KV, and send the result to the next stage."""
        ...


class StageRunner:
    """A stage's layers, the memory of their KV pages, and a row of page tables per request.

    Every plan brings the ids of its tokens (TokenFeed.SCHEDULER), so that the first stage need not
    hear what the last one has sampled."""

    def __init__(
        self,
        model: StageModel,
        *,
        kv_caches: Sequence[tuple[Tensor, ...]],
        rows: RowTable,
        page_size: int,
        device: torch.device,
        places: CachePlaces,
        adapters: StepAdapterPool | None = None,
    ) -> None:
        """places  tells where the whole model's cache groups find their pages and states
        adapters  has the LoRA adapters of requests; None: no request has one"""
        self._model = model
        self._kv_caches = kv_caches
        self._rows = rows
        self._page_size = page_size
        self._device = device
        self._places = places
        self._adapters = adapters

    @property
    def kv_caches(self) -> Sequence[tuple[Tensor, ...]]:
        return self._kv_caches

    def renew(self) -> None:
        """The model was filled again; no steps are recorded here that would have to follow."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; plans come in the order in which they were made. The result is empty."""
        change_slots(self._adapters, plan)
        if plan.scheduled:
            for start in plan.starts:
                self._rows.start(start)
            for entry in plan.scheduled:
                self._rows.take_pages(entry)
            self._places.copy_states(plan.scheduled, self._kv_caches, self._device)
            inputs = build_inputs(
                plan,
                self._rows,
                page_size=self._page_size,
                kv_caches=self._kv_caches,
                device=self._device,
                places=self._places,
                adapters=None if self._adapters is None else self._adapters.of_step,
            )
            with knowing_adapters(self._adapters, inputs.batch):
                self._model.forward(inputs.batch)
        return StepResult(step=plan.step, token_ids=[])
