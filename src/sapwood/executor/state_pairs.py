"""The states that a draft head takes, each with the token that follows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from msgspec.structs import replace as narrowed
from torch import Tensor

from sapwood.executor.drafting import DraftMemory, Sampled
from sapwood.kernels.transfer import upload, upload_one
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import RowStart, ScheduledTokens, StepPlan


class CapturingModel(Protocol):
    """See models.lm.decoder.Decoder."""

    def forward_capturing(
        self, batch: ForwardBatch, layers: Collection[int]
    ) -> tuple[Tensor, list[Tensor]]: ...


@dataclass(slots=True)
class _Following:
    """The tokens that follow the last ones of a plan's entries.

    at, token_ids  places in the step, and the ids that the host knows
    rows_at, rows  places, and the rows that have sampled what follows there
    """

    at: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    rows_at: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Span:
    """The right tokens of an entry.

    index   of the entry in the plan
    one     what it brought; None: no tokens, or none that the host knows yet
    entry   as in the plan, with its right drafts only, which are a chain
    places  of its tokens in the step
    """

    index: int
    one: Sampled | None
    entry: ScheduledTokens
    places: list[int]


def right_spans(scheduled: Sequence[ScheduledTokens], sampled: Sequence[Sampled]) -> list[Span]:
    """The right tokens of a step, those of requests with a single one first."""
    sampled_of = {one.index: one for one in sampled}
    spans: list[Span] = []
    start = 0
    for index, entry in enumerate(scheduled):
        one = sampled_of.get(index)
        first_draft = start + entry.num_new - len(entry.draft_ids)
        places = list(range(start, first_draft))
        start += entry.num_new
        if entry.draft_ids:
            right_ids = [] if one is None else one.right_ids
            places += [first_draft + draft for draft in entry.right_drafts(right_ids)]
            entry = narrowed(entry, draft_ids=right_ids, draft_parents=[])
        spans.append(Span(index, one, entry, places))
    return sorted(spans, key=lambda span: span.entry.num_new != 1)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The right tokens of a step, T of them.

    spans      of the entries, those with a single token first
    token_ids  [T] the token that follows each
    states     [T, width] of the model at each
    """

    spans: list[Span]
    token_ids: Tensor
    states: Tensor


class StatePairs:
    """Takes states from a model, and pairs them with tokens."""

    def __init__(
        self,
        model: CapturingModel,
        captures: Collection[int],
        memory: DraftMemory,
        *,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        """Pairs of one model.

        captures      the layers whose inputs are the states; empty: what comes after the last norm
        width, dtype  of the states of a token"""
        self._model = model
        self._captures = captures
        self._memory = memory
        self._width = width
        self._dtype = dtype
        self._texts: dict[int, RowStart] = {}

    def new_states(self, batch: ForwardBatch) -> Tensor:
        shape = (len(batch.token_ids), self._width)
        return torch.empty(shape, dtype=self._dtype, device=self._memory.device)

    def states_of(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        hidden, captured = self._model.forward_capturing(batch, self._captures)
        return hidden, torch.cat(captured, dim=-1) if captured else hidden

    def of_step(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        states: Tensor | None,
        sampled: Sequence[Sampled],
    ) -> Pairs:
        """The pairs of a step; all steps are told, in their order.

        batch    what the model has computed
        sampled  entries whose tokens the host knows"""
        assert states is not None, "the runner captures them"
        for begun in plan.starts:
            self._texts[begun.row] = begun
        spans = right_spans(plan.scheduled, sampled)
        following, start = _Following(), 0
        for span in spans:
            entry = span.entry
            start += entry.num_new
            if span.one is not None:
                following.at.append(start - 1)
                following.token_ids.append(span.one.token_ids[-1])
            elif entry.num_output is not None:
                following.rows_at.append(start - 1)
                following.rows.append(entry.row)
            else:
                following.at.append(start - 1)
                following.token_ids.append(_token_at(self._texts[entry.row], entry.end))
        token_ids = batch.token_ids
        if any(entry.draft_ids for entry in plan.scheduled):
            at = [place for span in spans for place in span.places]
            kept = upload_one(at, np.int64, self._memory.device)
            token_ids, states = token_ids.index_select(0, kept), states.index_select(0, kept)
        return Pairs(spans, self._shifted(token_ids, following), states)

    def _shifted(self, token_ids: Tensor, following: _Following) -> Tensor:
        """token_ids [T] -> the token that follows each."""
        found = token_ids.roll(-1)
        columns = (following.at, following.token_ids, following.rows_at, following.rows)
        arrays = [np.array(column, dtype=np.int64) for column in columns]
        at, known, rows_at, rows = upload(arrays, found.device)
        found.index_copy_(0, at, known)
        if following.rows:
            last = self._memory.rows.last_tokens.index_select(0, rows)
            found.index_copy_(0, rows_at, last)
        return found


def _token_at(text: RowStart, index: int) -> int:
    """The request's token of that index; 0 where vectors stand for tokens."""
    if index < len(text.prompt_ids):
        return text.prompt_ids[index]
    index -= len(text.prompt_ids)
    return text.output_ids[index] if index < len(text.output_ids) else 0
