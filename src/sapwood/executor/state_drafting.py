"""Guesses with a draft head, which goes on from the model's hidden states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sapwood.executor.drafting import DraftMemory, Sampled, Sampling, draft_tokens, note
from sapwood.kernels.transfer import upload
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import RowStart, StepPlan


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


class StateDrafter:
    """Pairs the state of each token with the token that follows, at the same place of the pages.

    So the head computes as many tokens as the model in each step, all anew: those that it had
    guessed, too, since now the model's own states are there. Of a prefix that ends where a page
    does, the last place was paired with what followed it in the request that computed it; after a
    hit this one key may be of another token. That may cost a right guess, never a right output.
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
    ) -> None:
        """A drafter.

        model     the one whose states the head takes
        sampling  chooses guesses
        states_width, dtype  of what the head takes for each token"""
        self._model = model
        self._head = head
        self._memory = memory
        self._sampling = sampling
        self._states_width = states_width
        self._dtype = dtype
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
    ) -> dict[int, list[int]]:
        hidden, states, ends = self._compute(plan, batch, states, sampled)
        going = [one for one in sampled if one.num_guesses]
        if not going:
            return {}
        [at] = upload([np.array([ends[one.index] for one in going])], hidden.device)
        hidden, states = hidden.index_select(0, at), states.index_select(0, at)
        with self._sampling.guessing([one.entry.row for one in going]):
            return self._guess(hidden, states, going)

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
    ) -> tuple[Tensor, Tensor, dict[int, int]]:
        """(what logits are made of and states for the next guesses, both [T, hidden], of all tokens
        of the step; by the entry's index the place of its last right token)"""
        assert states is not None, "the runner captures them"
        for begun in plan.starts:
            self._texts[begun.row] = begun
        sampled_of = {one.index: one for one in sampled}
        following, ends, start = _Following(), dict[int, int](), 0
        for index, entry in enumerate(plan.scheduled):
            one = sampled_of.get(index)
            num_right = entry.num_new - len(entry.draft_ids) if one is None else one.num_right
            place = ends[index] = start + num_right - 1
            start += entry.num_new
            if one is not None:
                following.at.append(place)
                following.token_ids.append(one.token_ids[-1])
            elif entry.num_output is not None:
                following.rows_at.append(place)
                following.rows.append(entry.row)
            else:
                following.at.append(place)
                following.token_ids.append(
                    _token_at(self._texts[entry.row], entry.position + num_right)
                )
        own = self._memory.inputs(plan.scheduled).batch
        token_ids = self._shifted(batch.token_ids, following)
        hidden, states = self._head.forward(
            replace(own, token_ids=token_ids), self._head.taken(states)
        )
        return hidden, states, ends

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
