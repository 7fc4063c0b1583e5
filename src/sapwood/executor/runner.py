"""Executes plans on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sapwood.executor.inputs import build_forward_batch
from sapwood.executor.rows import RowTable
from sapwood.executor.sampling.sampler import Sampler
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import StepPlan, StepResult


class DecoderModel(Protocol):
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] of the batch's T tokens; writes their KV."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab]."""
        ...


class Runner:
    """A model, the memory of its KV pages, and a row of state per running request."""

    def __init__(
        self,
        model: DecoderModel,
        *,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        rows: RowTable,
        sampler: Sampler,
        page_size: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._rows = rows
        self._sampler = sampler
        self._page_size = page_size
        self._device = device

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; plans come in the order in which they were made."""
        for start in plan.starts:
            self._rows.start(start)
            self._sampler.start(start)
        for entry in plan.scheduled:
            self._rows.take_pages(entry)
        batch = build_forward_batch(
            plan,
            self._rows,
            page_size=self._page_size,
            kv_caches=self._kv_caches,
            device=self._device,
        )
        hidden = self._model.forward(batch)
        sampling = [entry for entry in plan.scheduled if entry.num_output is not None]
        if not sampling:
            return StepResult(step=plan.step, token_ids=[])
        logits = self._model.logits(hidden[batch.logits_index])
        rows = [entry.row for entry in sampling]
        num_outputs = [entry.num_output or 0 for entry in sampling]
        chosen = self._sampler.sample(logits, rows, num_outputs)
        self._rows.last_tokens[torch.tensor(rows, device=self._device)] = chosen
        return StepResult(step=plan.step, token_ids=chosen.tolist())
