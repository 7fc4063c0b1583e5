"""Guesses with a row of draft heads, of which each makes one guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sapwood.executor.drafting import (
    DraftMemory,
    Sampled,
    Sampling,
    as_chains,
    draft_tokens,
    note,
)
from sapwood.executor.state_drafting import Head
from sapwood.executor.state_pairs import Pairs, Span, StatePairs
from sapwood.kernels.transfer import upload, upload_one
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import GuessedTokens, ScheduledTokens, StepPlan


@dataclass(frozen=True, slots=True)
class _Kept:
    """Which places of a request have their states kept: `count` of them, up to `end`."""

    end: int = 0
    count: int = 0

    def before(self, place: int) -> int:
        """How many places just before this one are kept."""
        return max(0, place - (self.end - self.count)) if self.end >= place else 0


class _LastStates:
    """The model's states at the last places of each request."""

    def __init__(self, memory: DraftMemory, count: int, *, width: int, dtype: torch.dtype) -> None:
        """count: places of each request"""
        self.count = count
        num_rows = len(memory.rows.seeds)
        self._states = torch.zeros(num_rows, count, width, dtype=dtype, device=memory.device)
        self._kept: dict[int, _Kept] = {}

    def forget(self, row: int) -> None:
        """Another request has the row, or the same one from its beginning."""
        self._kept.pop(row, None)

    def joined(self, pairs: Pairs) -> _Joined:
        """These states before the new ones."""
        spans = pairs.spans
        rows = upload_one([span.entry.row for span in spans], np.int64, self._states.device)
        kept = [self._kept.get(span.entry.row, _Kept()) for span in spans]
        own = self._states.index_select(0, rows).flatten(0, 1)
        starts = [0, *np.cumsum([span.entry.num_new for span in spans]).tolist()]
        return _Joined(spans, torch.cat((own, pairs.states)), kept, starts, self.count)

    def keep(self, joined: _Joined) -> None:
        """The last places are now those at the ends of the spans."""
        rows, at = list[int](), list[int]()
        for index, span in enumerate(joined.spans):
            end = span.entry.end
            known = span.entry.num_new + joined.num_before(index)
            self._kept[span.entry.row] = _Kept(end, min(known, self.count))
            rows.append(span.entry.row)
            at += [
                joined.row_of(index, place) if place >= end - known else 0
                for place in range(end - self.count, end)
            ]
        of_row, of_place = upload(
            [np.array(rows, dtype=np.int64), np.array(at, dtype=np.int64)], self._states.device
        )
        latest = joined.states.index_select(0, of_place)
        self._states.index_copy_(0, of_row, latest.view(len(rows), self.count, -1))


@dataclass(frozen=True, slots=True)
class _Joined:
    """States of a step's spans, and of the places before them.

    states  [num_spans * count + T, width]: `count` of each span, then the new ones
    kept    by span: which of the `count` places are there
    starts  by span: its first one among the new ones
    """

    spans: Sequence[Span]
    states: Tensor
    kept: Sequence[_Kept]
    starts: Sequence[int]
    count: int

    def num_before(self, index: int) -> int:
        """How many places just before the span have states here."""
        return self.kept[index].before(self.spans[index].entry.position)

    def row_of(self, index: int, place: int) -> int:
        """The row of `states` of a place of the span's request."""
        first = self.spans[index].entry.position
        if place >= first:
            return len(self.spans) * self.count + self.starts[index] + place - first
        return (index + 1) * self.count - (self.kept[index].end - place)


class LayeredDrafter:
    """Head i pairs the state of a token with the token that comes i + 1 places later, and guesses
    the one after that. All heads take the model's own states.

    So head i can compute a place for good once the model is i places further, and the states of the
    last places are kept for it. To guess, it computes the places in between with the guesses of the
    heads before it, and computes them anew in the next step. After a prefix hit the places just
    before its end are as the request left them that computed them; that may cost a right guess,
    never a right output.
    """

    def __init__(
        self,
        pairs: StatePairs,
        heads: Sequence[Head],
        memory: DraftMemory,
        sampling: Sampling,
        *,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        """A drafter.

        pairs     of the model whose states the heads take
        heads     at least two
        sampling  chooses guesses
        width, dtype  of the states of a token"""
        self._pairs = pairs
        self._heads = tuple(heads)
        self._memory = memory
        self._sampling = sampling
        self._last = _LastStates(memory, len(heads) - 1, width=width, dtype=dtype)

    takes_states = True

    def new_states(self, batch: ForwardBatch) -> Tensor:
        return self._pairs.new_states(batch)

    def states_of(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        return self._pairs.states_of(batch)

    def follow(self, plan: StepPlan, batch: ForwardBatch, states: Tensor | None) -> None:
        self._compute(plan, batch, states, [])

    def guess(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        states: Tensor | None,
        sampled: Sequence[Sampled],
    ) -> dict[int, GuessedTokens]:
        return as_chains(self._compute(plan, batch, states, sampled))

    def _compute(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        states: Tensor | None,
        sampled: Sequence[Sampled],
    ) -> dict[int, list[int]]:
        for begun in plan.starts:
            self._last.forget(begun.row)
        pairs = self._pairs.of_step(plan, batch, states, sampled)
        joined = self._last.joined(pairs)
        going = [one for one in sampled if one.num_guesses]
        guesses: dict[int, list[int]] = {one.index: [] for one in going}
        rows = [one.entry.row for one in going]
        with self._sampling.guessing(rows) if rows else nullcontext():
            for depth, head in enumerate(self._heads):
                hidden = self._run(head, depth, pairs.token_ids, joined, guesses, going)
                if going:
                    going = self._guess(head.logits(hidden), going, guesses)
        self._last.keep(joined)
        return guesses

    def _guess(
        self, logits: Tensor, going: Sequence[Sampled], guesses: dict[int, list[int]]
    ) -> list[Sampled]:
        """Choose the next guess of each entry. Returns those that want another one."""
        count = len(guesses[going[0].index])
        found = self._sampling.sample(
            logits,
            [one.entry.row for one in going],
            [(one.entry.num_output or 0) + len(one.token_ids) + count for one in going],
        )
        ended = note(found, going, guesses, self._sampling)
        return [one for one in going if one.num_guesses > count + 1 and one.entry.row not in ended]

    def _run(
        self,
        head: Head,
        depth: int,
        token_ids: Tensor,
        joined: _Joined,
        guesses: Mapping[int, list[int]],
        going: Sequence[Sampled],
    ) -> Tensor:
        """Compute with head `depth` the places that are due: those for good, and of entries in
        `going` those up to the last one. Returns what logits are made of at the last places of
        `going`, [len(going), hidden].

        token_ids  [T] the token that follows each of the step's right tokens"""
        wanted = {one.index for one in going}
        latest = [token_id for one in going for token_id in guesses[one.index]]
        first_guess = {one.index: len(token_ids) + at * depth for at, one in enumerate(going)}
        due: list[_Due] = []
        for index, span in enumerate(joined.spans):
            begin = span.entry.position - min(depth, joined.num_before(index))
            known_end = span.entry.end - depth
            end = span.entry.end if span.index in wanted else known_end
            if begin < end:
                due.append(_Due(index, range(begin, end), known_end))
        if not due:
            return joined.states[:0]
        # As in a plan: single tokens first.
        due.sort(key=lambda one: len(one.places) != 1)
        entries, ends = list[ScheduledTokens](), dict[int, int]()
        of_tokens, of_states = list[int](), list[int]()
        for one in due:
            span = joined.spans[one.index]
            shift = joined.starts[one.index] + depth - span.entry.position
            of_tokens += [
                place + shift
                if place < one.known_end
                else first_guess[span.index] + place - one.known_end
                for place in one.places
            ]
            of_states += [joined.row_of(one.index, place) for place in one.places]
            ends[span.index] = len(of_states) - 1
            placeholders = [0] * len(one.places)
            entries.append(draft_tokens(span.entry.row, one.places.start, placeholders))
        arrays = (of_tokens, of_states, [ends[one.index] for one in going], latest)
        at_token, at_state, at_end, guessed = upload(
            [np.array(array, dtype=np.int64) for array in arrays], token_ids.device
        )
        own = self._memory.inputs(entries).batch
        batch = replace(own, token_ids=torch.cat((token_ids, guessed)).index_select(0, at_token))
        taken = head.taken(joined.states.index_select(0, at_state))
        hidden, _ = head.forward(batch, taken)
        return hidden.index_select(0, at_end)


@dataclass(frozen=True, slots=True)
class _Due:
    """Places of a span that a head computes; from `known_end` on with guesses."""

    index: int
    places: range
    known_end: int
