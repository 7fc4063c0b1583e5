"""Executes plans on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sapwood.executor.graphs import Graph
from sapwood.executor.inputs import build_inputs
from sapwood.executor.rows import RowTable
from sapwood.executor.sampling.sampler import Sampler
from sapwood.kernels.recording import DecoderParts
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import StepPlan, StepResult


class DecoderModel(Protocol):
    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits [S, vocab] of the rows at batch.logits_index; writes the KV of all tokens."""
        ...

    def parts(self) -> DecoderParts:
        """What it is made of, for a graph."""
        ...


class Runner:
    """A model, the memory of its KV pages, and a row of state per running request."""

    def __init__(
        self,
        model: DecoderModel,
        graph: Graph,
        *,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        rows: RowTable,
        sampler: Sampler,
        page_size: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._graph = graph
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
        inputs = build_inputs(
            plan,
            self._rows,
            page_size=self._page_size,
            kv_caches=self._kv_caches,
            device=self._device,
        )
        logits = self._graph.replay(inputs.batch)
        if logits is None:
            logits = self._model.compute(inputs.batch)
        if not inputs.sampling:
            return StepResult(step=plan.step, token_ids=[])
        rows = [entry.row for entry in inputs.sampling]
        num_outputs = [entry.num_output or 0 for entry in inputs.sampling]
        chosen = self._sampler.sample(logits, rows, num_outputs)
        self._rows.last_tokens.index_copy_(0, inputs.sampling_rows, chosen)
        return StepResult(step=plan.step, token_ids=chosen.tolist())
