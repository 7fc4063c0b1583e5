"""Guesses with a small language model that has the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
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
from sapwood.executor.recorded import RecordedSteps
from sapwood.kernels.transfer import upload_one
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import GuessedTokens, ScheduledTokens, StepPlan


class DraftModel(Protocol):
    """A whole language model; see models.lm.decoder.Decoder."""

    def compute(self, batch: ForwardBatch) -> Tensor: ...


class StandaloneDrafter:
    """Guesses with a small language model that has the same vocabulary.

    A guess is drawn from the draft model's logits with the random number that its place has in the
    request, so where the two models agree, their tokens are the same with and without temperature.
    """

    def __init__(
        self,
        model: DraftModel,
        recorded: RecordedSteps,
        memory: DraftMemory,
        sampling: Sampling,
        *,
        vocab_size: int,
        draft_vocab_size: int,
        limits: TreeLimits,
    ) -> None:
        """A drafter.

        recorded          steps of the draft model
        sampling          chooses guesses
        vocab_size        of the model; ids that only one of the two has are never guessed, and look
                          to the draft model like its last id
        limits            of trees of guesses
        """
        self._model = model
        self._recorded = recorded
        self._memory = memory
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._draft_vocab_size = draft_vocab_size
        self._trees = TreeGuesser(limits, sampling) if limits.breadth > 1 else None
        # How many tokens of each row's request have their keys here, if all guesses were right.
        self._num_done: NDArray[np.int64] = np.zeros(len(memory.rows.seeds), dtype=np.int64)

    takes_states = False

    def new_states(self, batch: ForwardBatch) -> Tensor | None:
        return None

    def states_of(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a whole language model takes no states of another")

    def follow(self, plan: StepPlan, batch: ForwardBatch, states: Tensor | None) -> None:
        memory = self._memory
        own = memory.inputs(plan.scheduled).batch
        # The token ids are the model's: a row's last token is another one by now.
        self._run(
            replace(own, token_ids=batch.token_ids, logits_index=batch.logits_index[:0]),
        )
        for entry in plan.scheduled:
            self._num_done[entry.row] = entry.position + entry.num_new - len(entry.draft_ids)

    def guess(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        states: Tensor | None,
        sampled: Sequence[Sampled],
    ) -> dict[int, GuessedTokens]:
        for begun in plan.starts:
            self._num_done[begun.row] = 0
        sampled_of = {one.index: one for one in sampled}
        known = batch.token_ids.tolist()
        missing: list[tuple[ScheduledTokens, Sampled | None]] = []
        start = 0
        for index, entry in enumerate(plan.scheduled):
            one = sampled_of.get(index)
            num_right = entry.num_new - len(entry.draft_ids) if one is None else one.num_right
            end = entry.position + num_right
            done = min(max(int(self._num_done[entry.row]), entry.position), end)
            token_ids = known[start : start + entry.num_new - len(entry.draft_ids)]
            token_ids += entry.draft_ids if one is None else one.right_ids
            token_ids = token_ids[done - entry.position :]
            start += entry.num_new
            self._num_done[entry.row] = end
            if one is not None and one.num_guesses:
                token_ids.append(one.token_ids[-1])
                # The keys of a tree's guesses do not lie as those of the right ones will.
                self._num_done[entry.row] = end + (1 if self._trees else one.num_guesses)
            else:
                one = None
            if token_ids:
                missing.append(
                    (draft_tokens(entry.row, done, token_ids, samples=one is not None), one)
                )
        if not missing:
            return {}
        # As in a plan: single tokens first.
        missing.sort(key=lambda pair: pair[0].num_new != 1)
        logits = self._run(self._memory.inputs([entry for entry, _ in missing]).batch)
        going = [one for _, one in missing if one is not None]
        if self._trees is not None:
            return self._trees.guess(logits, going, self._compute_trees, shift=0)
        with self._sampling.guessing([one.entry.row for one in going]):
            return as_chains(self._guess(logits, going))

    def _guess(self, logits: Tensor, going: Sequence[Sampled]) -> dict[int, list[int]]:
        """Guess one token after the other; logits [S, vocab] are those after the last token of each
        entry in `going`."""
        guesses: dict[int, list[int]] = {one.index: [] for one in going}
        count = 0
        while going:
            found = self._sampling.sample(
                logits,
                [one.entry.row for one in going],
                [(one.entry.num_output or 0) + len(one.token_ids) + count for one in going],
            )
            count += 1
            ended = note(found, going, guesses, self._sampling)
            going = [one for one in going if one.num_guesses > count and one.entry.row not in ended]
            if going:
                latest = [
                    draft_tokens(one.entry.row, one.num_known + count - 1, guesses[one.index][-1:])
                    for one in going
                ]
                logits = self._run(self._memory.inputs(latest).batch)
        return guesses

    def _compute_trees(self, spans: Sequence[TreeSpan]) -> Tensor:
        batch = self._memory.inputs([span.entry for span in spans]).batch
        at = upload_one(frontiers_at(spans), np.int64, self._memory.device)
        return self._run(replace(batch, logits_index=at))

    def _run(self, batch: ForwardBatch) -> Tensor:
        """Logits [S, vocab_size] of the rows at batch.logits_index."""
        if self._draft_vocab_size < self._vocab_size:
            batch = replace(batch, token_ids=batch.token_ids.clamp(max=self._draft_vocab_size - 1))
        logits = self._recorded.replay(batch)
        if logits is None:
            logits = self._model.compute(batch)
        return of_vocabulary(logits, self._vocab_size)


def of_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """logits [S, V] -> [S, vocab_size]: tokens that have no logit are never chosen."""
    lacking = vocab_size - logits.shape[1]
    if lacking <= 0:
        return logits[:, :vocab_size]
    return torch.nn.functional.pad(logits, (0, lacking), value=-torch.inf)
