"""Guesses with a draft head, which goes on from the model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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
from sapwood.executor.guess_trees import TreeGuesser, TreeLimits, TreeSpan, frontiers_at
from sapwood.executor.state_pairs import StatePairs
from sapwood.kernels.transfer import upload, upload_one
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.draft_tree import ROOT
from sapwood.schema.step import GuessedTokens, StepPlan


class Head(Protocol):
    """See models.drafts.head.DraftHead."""

    @property
    def captures(self) -> tuple[int, ...]: ...

    def taken(self, states: Tensor) -> Tensor: ...

    def forward(self, batch: ForwardBatch, states: Tensor) -> tuple[Tensor, Tensor]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


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
        pairs: StatePairs,
        head: Head,
        memory: DraftMemory,
        sampling: Sampling,
        *,
        limits: TreeLimits,
    ) -> None:
        """A drafter.

        pairs     of the model whose states the head takes
        sampling  chooses guesses
        limits    of trees of guesses"""
        self._pairs = pairs
        self._head = head
        self._memory = memory
        self._sampling = sampling
        self._trees = TreeGuesser(limits, sampling) if limits.breadth > 1 else None

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
        pairs = self._pairs.of_step(plan, batch, states, sampled)
        ends, start = dict[int, int](), 0
        for span in pairs.spans:
            start += span.entry.num_new
            ends[span.index] = start - 1
        own = self._memory.inputs([span.entry for span in pairs.spans]).batch
        taken = self._head.taken(pairs.states)
        hidden, outcome = self._head.forward(replace(own, token_ids=pairs.token_ids), taken)
        return _Computed(hidden, outcome, taken, ends)
