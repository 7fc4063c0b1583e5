"""Guesses with a draft head, which goes on from the model's hidden states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from msgspec.structs import replace as narrowed
from torch import Tensor

from sapwood.executor.drafting import (
    DraftMemory,
    Sampled,
    Sampling,
    as_chains,
    draft_tokens,
    note,
)
from sapwood.executor.guess_trees import TreeGuesser, TreeLimits, TreeSpan, frontiers_at
from sapwood.kernels.transfer import upload, upload_one
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.draft_tree import ROOT
from sapwood.schema.step import GuessedTokens, RowStart, ScheduledTokens, StepPlan


class CapturingModel(Protocol):
    """See models.lm.decoder.Decoder."""

    def forward_capturing(
        self, batch: ForwardBatch, layers: Collection[int]
    ) -> tuple[Tensor, list[Tensor]]: ...


class Head(Protocol):
    """See models.drafts.head.DraftHead."""

    @property
    def captures(self) -> tuple[int, ...]: ...

    def taken(self, states: Tensor) -> Tensor: ...

    def forward(self, batch: ForwardBatch, states: Tensor) -> tuple[Tensor, Tensor]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


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
class _Span:
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


def _right_spans(scheduled: Sequence[ScheduledTokens], sampled: Sequence[Sampled]) -> list[_Span]:
    """The right tokens of a step, those of requests with a single one first."""
    sampled_of = {one.index: one for one in sampled}
    spans: list[_Span] = []
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
        spans.append(_Span(index, one, entry, places))
    return sorted(spans, key=lambda span: span.entry.num_new != 1)


@dataclass(frozen=True, slots=True)
class _Computed:
    """What the head has computed of the right tokens of a step, [T, hidden] each.

    hidden   what logits are made of
    outcome  states for the next guesses
    taken    states that it took
    ends     by the entry's index the place of its last token
    """

    hidden: Tensor
    outcome: Tensor
    taken: Tensor
    ends: dict[int, int]

    def of(self, at: Tensor) -> _Computed:
        """Of some of the tokens alone."""
        hidden, outcome, taken = (
            one.index_select(0, at) for one in (self.hidden, self.outcome, self.taken)
        )
        return _Computed(hidden, outcome, taken, {})


class _HeadTrees:
    """Computes the guesses of trees: what each takes is the outcome of the one that it follows."""

    def __init__(
        self, head: Head, memory: DraftMemory, last: _Computed, going: Sequence[Sampled]
    ) -> None:
        """last  of the last known token of each request in `going`"""
        self._head = head
        self._memory = memory
        self._states = torch.cat((last.taken, last.outcome))
        # The rows of `_states`: what the roots took; by request and guess, what came of it.
        self._taken_at = {one.index: row for row, one in enumerate(going)}
        self._outcome_at = {(one.index, ROOT): len(going) + row for row, one in enumerate(going)}

    def __call__(self, spans: Sequence[TreeSpan]) -> Tensor:
        """The logits [S, vocab] after each guess of the spans' frontiers."""
        took: list[int] = []
        for span in spans:
            index = span.one.index
            took.append(self._taken_at[index])
            took += [self._outcome_at[index, span.tree.parent_of(node)] for node in span.nodes]
        rows, at = upload(
            [np.array(took, dtype=np.int64), np.array(frontiers_at(spans), dtype=np.int64)],
            self._states.device,
        )
        batch = self._memory.inputs([span.entry for span in spans]).batch
        hidden, outcome = self._head.forward(batch, self._states.index_select(0, rows))
        newest = [(span.one.index, node) for span in spans for node in span.tree.frontier]
        for row, key in enumerate(newest, start=len(self._states)):
            self._outcome_at[key] = row
        self._states = torch.cat((self._states, outcome.index_select(0, at)))
        return self._head.logits(hidden.index_select(0, at))


class StateDrafter:
    """Pairs the state of each token with the token that follows, at the same place of the pages.

    So the head computes the same tokens as the model in each step, less the wrong drafts, all anew:
    those that it had guessed, too, since now the model's own states are there. Of a prefix that
    ends where a page does, the last place was paired with what followed it in the request that
    computed it; after a hit this one key may be of another token. That may cost a right guess,
    never a right output.
    """

    def __init__(
        self,
        model: CapturingModel,
        head: Head,
        memory: DraftMemory,
        sampling: Sampling,
        *,
        states_width: int,
        dtype: torch.dtype,
        limits: TreeLimits,
    ) -> None:
        """A drafter.

        model     the one whose states the head takes
        sampling  chooses guesses
        states_width, dtype  of what the head takes for each token
        limits    of trees of guesses"""
        self._model = model
        self._head = head
        self._memory = memory
        self._sampling = sampling
        self._states_width = states_width
        self._dtype = dtype
        self._trees = TreeGuesser(limits, sampling) if limits.breadth > 1 else None
        self._texts: dict[int, RowStart] = {}

    takes_states = True

    def new_states(self, batch: ForwardBatch) -> Tensor:
        shape = (len(batch.token_ids), self._states_width)
        return torch.empty(shape, dtype=self._dtype, device=self._memory.device)

    def states_of(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        hidden, captured = self._model.forward_capturing(batch, self._head.captures)
        return hidden, torch.cat(captured, dim=-1) if captured else hidden

    def follow(self, plan: StepPlan, batch: ForwardBatch, states: Tensor | None) -> None:
        self._compute(plan, batch, states, [])

    def guess(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        states: Tensor | None,
        sampled: Sequence[Sampled],
    ) -> dict[int, GuessedTokens]:
        computed = self._compute(plan, batch, states, sampled)
        going = [one for one in sampled if one.num_guesses]
        if not going:
            return {}
        at = upload_one([computed.ends[one.index] for one in going], np.int64, self._memory.device)
        last = computed.of(at)
        if self._trees is not None:
            compute = _HeadTrees(self._head, self._memory, last, going)
            logits = self._head.logits(last.hidden)
            return self._trees.guess(logits, going, compute, shift=-1)
        with self._sampling.guessing([one.entry.row for one in going]):
            return as_chains(self._guess(last.hidden, last.outcome, going))

    def _guess(
        self, hidden: Tensor, states: Tensor, going: Sequence[Sampled]
    ) -> dict[int, list[int]]:
        """Guess one token after the other, from what the head has computed of the last right token
        of each entry in `going`."""
        guesses: dict[int, list[int]] = {one.index: [] for one in going}
        count = 0
        while True:
            found = self._sampling.sample(
                self._head.logits(hidden),
                [one.entry.row for one in going],
                [(one.entry.num_output or 0) + len(one.token_ids) + count for one in going],
            )
            count += 1
            ended = note(found, going, guesses, self._sampling)
            kept = [
                index
                for index, one in enumerate(going)
                if one.num_guesses > count and one.entry.row not in ended
            ]
            if not kept:
                return guesses
            if len(kept) < len(going):
                [at] = upload([np.array(kept)], hidden.device)
                states = states.index_select(0, at)
                going = [going[index] for index in kept]
            latest = [
                # The place of the token before: the pair of its state and the guess.
                draft_tokens(one.entry.row, one.num_known + count - 2, guesses[one.index][-1:])
                for one in going
            ]
            hidden, states = self._head.forward(self._memory.inputs(latest).batch, states)

    def _compute(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        states: Tensor | None,
        sampled: Sequence[Sampled],
    ) -> _Computed:
        """Compute the right tokens of a step."""
        assert states is not None, "the runner captures them"
        for begun in plan.starts:
            self._texts[begun.row] = begun
        spans = _right_spans(plan.scheduled, sampled)
        following, ends, start = _Following(), dict[int, int](), 0
        for span in spans:
            entry = span.entry
            start += entry.num_new
            place = ends[span.index] = start - 1
            if span.one is not None:
                following.at.append(place)
                following.token_ids.append(span.one.token_ids[-1])
            elif entry.num_output is not None:
                following.rows_at.append(place)
                following.rows.append(entry.row)
            else:
                following.at.append(place)
                following.token_ids.append(_token_at(self._texts[entry.row], entry.end))
        token_ids = batch.token_ids
        if any(entry.draft_ids for entry in plan.scheduled):
            at = [place for span in spans for place in span.places]
            kept = upload_one(at, np.int64, self._memory.device)
            token_ids, states = token_ids.index_select(0, kept), states.index_select(0, kept)
        own = self._memory.inputs([span.entry for span in spans]).batch
        token_ids, taken = self._shifted(token_ids, following), self._head.taken(states)
        hidden, outcome = self._head.forward(replace(own, token_ids=token_ids), taken)
        return _Computed(hidden, outcome, taken, ends)

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
