"""Executes plans on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sapwood.executor.graphs import Graph
from sapwood.executor.inputs import build_inputs
from sapwood.executor.rows import RowTable
from sapwood.executor.sampling.logprobs import LogprobRecorder, by_entry
from sapwood.executor.sampling.sampler import Sampler
from sapwood.kernels.recording import DecoderParts
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.step import StepPlan, StepResult


class DecoderModel(Protocol):
    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits [S, vocab] of the rows at batch.logits_index; writes the KV of all tokens."""
        ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states of all tokens after the last norm, [T, hidden]; writes their KV."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in fp32"""
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
        self._logprobs = LogprobRecorder(device)
        self._page_size = page_size
        self._device = device

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; plans come in the order in which they were made."""
        for row in plan.ends:
            self._sampler.end(row)
        if not plan.scheduled:
            return StepResult(step=plan.step, token_ids=[])
        for start in plan.starts:
            self._rows.start(start)
            self._sampler.start(start)
            self._logprobs.start(start)
        for entry in plan.scheduled:
            self._rows.take_pages(entry)
        inputs = build_inputs(
            plan,
            self._rows,
            page_size=self._page_size,
            kv_caches=self._kv_caches,
            device=self._device,
        )
        logits, of_prompts = self._compute(plan, inputs.batch)
        if not inputs.sampling:
            return _result(plan, [], {}, of_prompts, {}, {})
        rows = [entry.row for entry in inputs.sampling]
        num_outputs = [entry.num_output or 0 for entry in inputs.sampling]
        kept = self._logprobs.keep(logits, rows)
        chosen = self._sampler.sample(logits, rows, num_outputs)
        self._rows.last_tokens.index_copy_(0, inputs.sampling_rows, chosen)
        of_outputs = self._logprobs.of_output(kept, rows, chosen) if kept is not None else {}
        jumps = self._sampler.jump(rows)
        failures = self._sampler.take_failures()
        return _result(plan, chosen.tolist(), of_outputs, of_prompts, failures, jumps)

    def _compute(
        self, plan: StepPlan, batch: ForwardBatch
    ) -> tuple[Tensor, dict[int, TokenLogprobs]]:
        """Logits [S, vocab] of the rows at batch.logits_index, and what prompts are scored with."""
        if not self._logprobs.scores(plan.scheduled):
            logits = self._graph.replay(batch)
            return (self._model.compute(batch) if logits is None else logits), {}
        # A graph gives only the logits of what is sampled.
        hidden = self._model.forward(batch)
        of_prompts = self._logprobs.of_prompts(plan.scheduled, hidden, self._model.logits)
        return self._model.logits(hidden.index_select(0, batch.logits_index)), of_prompts


def _result(
    plan: StepPlan,
    token_ids: list[int],
    of_outputs: dict[int, TokenLogprobs],
    of_prompts: dict[int, TokenLogprobs],
    failures: dict[int, str],
    jumps: dict[int, list[int]],
) -> StepResult:
    """of_outputs by place among the sampled, of_prompts by entry, failures and jumps by row."""
    if not of_outputs and not of_prompts and not failures and not jumps:
        return StepResult(step=plan.step, token_ids=token_ids)
    scheduled = list(enumerate(plan.scheduled))
    sampling = [index for index, entry in scheduled if entry.num_output is not None]
    return StepResult(
        step=plan.step,
        token_ids=token_ids,
        logprobs=by_entry(sampling, of_outputs, of_prompts),
        failures={
            index: failures[entry.row] for index, entry in scheduled if entry.row in failures
        },
        forced={index: jumps[entry.row] for index, entry in scheduled if entry.row in jumps},
    )
