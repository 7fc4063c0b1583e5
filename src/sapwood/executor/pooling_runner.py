"""Executes plans on one rank, for a model that makes embeddings or scores instead of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.inputs import ONE_GROUP, build_inputs
from sapwood.executor.rows import RowTable
from sapwood.executor.sight import Sight
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.pooling import Pooler
from sapwood.schema.step import RowStart, StepPlan, StepResult

_ONE_TEXT = 2**31 - 1
"""A length that no text reaches, so that all tokens belong to the first text."""


class PoolingModel(Protocol):
    def hidden(self, batch: ForwardBatch) -> Tensor:
        """Hidden states of all tokens, [T, hidden]; a decoder writes their KV."""
        ...

    def answer(self, pooled: Tensor) -> Tensor:
        """The output of the model's head: pooled [A, hidden] fp32 -> [A, outputs] fp32."""
        ...


class PoolingRunner:
    """A model, the memory of its KV pages if it has any, and the pooled states of its requests."""

    def __init__(
        self,
        model: PoolingModel,
        pooler: Pooler,
        *,
        kv_caches: Sequence[tuple[Tensor, ...]],
        rows: RowTable,
        page_size: int,
        device: torch.device,
        places: CachePlaces = ONE_GROUP,
        sight: Sight | None = None,
    ) -> None:
        """sight: encodes what prompts show; None: no prompt shows anything"""
        self._model = model
        self._pooler = pooler
        self._kv_caches = kv_caches
        self._places = places
        self._rows = rows
        self._page_size = page_size
        self._device = device
        self._sight = sight
        self._num_first: NDArray[np.int64] = np.full(len(rows.sampling), _ONE_TEXT, dtype=np.int64)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; plans come in the order in which they were made."""
        encoding_s = 0.0 if self._sight is None else self._sight.follow(plan)
        for start in plan.starts:
            self._start(start)
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
            sight=self._sight,
        )
        rows = np.array([entry.row for entry in plan.scheduled], dtype=np.int64)
        lengths = np.array(inputs.batch.attention.query_lens, dtype=np.int64)
        hidden = self._model.hidden(self._with_types(inputs.batch, rows, lengths))
        answering = [index for index, entry in enumerate(plan.scheduled) if entry.answers]
        pooled = self._pooler.pool(
            hidden,
            rows=torch.from_numpy(rows).to(self._device),
            lengths=torch.from_numpy(lengths).to(self._device),
            positions=inputs.batch.positions,
            answering=torch.tensor(answering, dtype=torch.int64, device=self._device),
            context_lens=inputs.batch.attention.context_len,
        )
        if not answering:
            return StepResult(step=plan.step, token_ids=[], encoding_s=encoding_s)
        numbers = self._pooler.finish(self._model.answer(pooled)).cpu().numpy().astype("<f4")
        values = {index: row.tobytes() for index, row in zip(answering, numbers, strict=True)}
        return StepResult(step=plan.step, token_ids=[], values=values, encoding_s=encoding_s)

    def _start(self, start: RowStart) -> None:
        self._rows.start(start)
        if self._sight is not None:
            self._sight.start(start, self._rows)
        self._pooler.start(start.row)
        num_first = None if start.options.embed is None else start.options.embed.num_first
        self._num_first[start.row] = _ONE_TEXT if num_first is None else num_first

    def _with_types(
        self, batch: ForwardBatch, rows: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> ForwardBatch:
        """The batch with `token_types`, if one of its prompts is a pair of texts."""
        num_first = self._num_first[rows]
        if (num_first == _ONE_TEXT).all():
            return batch
        bounds = torch.from_numpy(num_first.repeat(lengths)).to(self._device)
        return replace(batch, token_types=(batch.positions >= bounds).to(torch.int64))
