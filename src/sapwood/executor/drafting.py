"""A draft model on the rank: after each step it guesses the tokens of the requests' next steps.

The draft model's keys and values lie in the same pages as the model's, in caches of their own. It
computes every token that the model computes, in the same step, so wherever the model's keys are,
its own are too: after a prefix hit, after a retraction, in a prompt's chunks.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.inputs import StepInputs, build_inputs
from sapwood.executor.recorded import RecordedSteps
from sapwood.executor.rows import RowTable
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import ScheduledTokens, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMemory:
    """Where a draft model finds its keys and values.

    rows       the model's own: its page tables serve both
    places     tells where the draft model's cache groups find their pages
    kv_caches  of the draft model's layers
    """

    rows: RowTable
    places: CachePlaces
    kv_caches: Sequence[tuple[Tensor, ...]]
    page_size: int
    device: torch.device

    def inputs(self, scheduled: Sequence[ScheduledTokens]) -> StepInputs:
        """The inputs of the draft model for these tokens."""
        return build_inputs(
            StepPlan(step=-1, starts=[], scheduled=list(scheduled)),
            self.rows,
            page_size=self.page_size,
            kv_caches=self.kv_caches,
            device=self.device,
            places=self.places,
            takes_embeds=False,
        )


class Sampling(Protocol):
    """See GuessSampler."""

    def guessing(self, rows: Sequence[int]) -> AbstractContextManager[None]: ...

    def sample(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> Tensor: ...

    def take(self, rows: Sequence[int], token_ids: Sequence[int]) -> set[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """An entry of a plan after whose tokens something was sampled.

    index      in the plan
    entry      of the plan
    token_ids  its right drafts, and the token that was sampled after them
    has_jumped  whether tokens follow that nobody samples
    """

    index: int
    entry: ScheduledTokens
    token_ids: Sequence[int]
    has_jumped: bool = False

    @property
    def num_right(self) -> int:
        """Its new tokens, less the wrong drafts."""
        return self.entry.num_new - len(self.entry.draft_ids) + len(self.token_ids) - 1

    @property
    def num_known(self) -> int:
        """Tokens of the request, the sampled one included."""
        return self.entry.position + self.num_right + 1

    @property
    def num_guesses(self) -> int:
        """How many guesses make sense, of those asked for."""
        if self.has_jumped:
            return 0
        return max(0, min(self.entry.num_guesses, self.entry.guesses_end - self.num_known))


class Drafter(Protocol):
    """Guesses after each step of a runner; all steps are told of, in their order."""

    @property
    def takes_states(self) -> bool:
        """Whether it goes on from the model's hidden states, which `states_of` computes."""
        ...

    def new_states(self, batch: ForwardBatch) -> Tensor | None:
        """Memory for the states of all tokens of a step, for a recorded step to write; None if it
        takes none."""
        ...

    def states_of(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(the model's hidden states after its last norm, the states that `follow` and `guess`
        take), both of all tokens of a step; writes the model's keys and values."""
        ...

    def follow(self, plan: StepPlan, batch: ForwardBatch, states: Tensor | None) -> None:
        """Compute the tokens of a step that asks for no guesses, and of whose tokens no host knows
        yet.

        batch   what the model has computed
        states  as from `states_of`; None if it takes none"""
        ...

    def guess(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        states: Tensor | None,
        sampled: Sequence[Sampled],
    ) -> dict[int, list[int]]:
        """Compute the tokens of a step, and guess. Returns guesses by the entry's index.

        sampled  the entries of the plan that brought tokens, in its order"""
        ...


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
    ) -> None:
        """A drafter.

        recorded          steps of the draft model
        sampling          chooses guesses
        vocab_size        of the model; ids that only one of the two has are never guessed, and look
                          to the draft model like its last id
        """
        self._model = model
        self._recorded = recorded
        self._memory = memory
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._draft_vocab_size = draft_vocab_size
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
    ) -> dict[int, list[int]]:
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
            token_ids = known[start + done - entry.position : start + num_right]
            start += entry.num_new
            self._num_done[entry.row] = end
            if one is not None and one.num_guesses:
                token_ids.append(one.token_ids[-1])
                self._num_done[entry.row] = end + one.num_guesses
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
        with self._sampling.guessing([one.entry.row for one in going]):
            return self._guess(logits, going)

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

    def _run(self, batch: ForwardBatch) -> Tensor:
        """Logits [S, vocab_size] of the rows at batch.logits_index."""
        if self._draft_vocab_size < self._vocab_size:
            batch = replace(batch, token_ids=batch.token_ids.clamp(max=self._draft_vocab_size - 1))
        logits = self._recorded.replay(batch)
        if logits is None:
            logits = self._model.compute(batch)
        return of_vocabulary(logits, self._vocab_size)


def note(
    found: Tensor, going: Sequence[Sampled], guesses: dict[int, list[int]], sampling: Sampling
) -> set[int]:
    """Append each token of found [len(going)] to its guesses. Returns the rows whose output ends
    there."""
    token_ids = found.tolist()
    for one, token_id in zip(going, token_ids, strict=True):
        guesses[one.index].append(token_id)
    return sampling.take([one.entry.row for one in going], token_ids)


def of_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """logits [S, V] -> [S, vocab_size]: tokens that have no logit are never chosen."""
    lacking = vocab_size - logits.shape[1]
    if lacking <= 0:
        return logits[:, :vocab_size]
    return torch.nn.functional.pad(logits, (0, lacking), value=-torch.inf)


def draft_tokens(
    row: int, position: int, token_ids: list[int], *, samples: bool = True
) -> ScheduledTokens:
    """Tokens for the draft model to compute; with `samples`, the logits after them are wanted."""
    return ScheduledTokens(
        row=row,
        position=position,
        token_ids=token_ids,
        first_page=0,
        pages=[],
        num_output=0 if samples else None,
    )


def sampled_entries(
    plan: StepPlan, token_ids: Sequence[Sequence[int]], jumps: Container[int]
) -> list[Sampled]:
    """The entries that brought tokens.

    token_ids  of the entries that sample
    jumps      rows in which tokens follow that nobody samples
    """
    sampling = [
        (index, entry) for index, entry in enumerate(plan.scheduled) if entry.num_output is not None
    ]
    return [
        Sampled(index=index, entry=entry, token_ids=found, has_jumped=entry.row in jumps)
        for (index, entry), found in zip(sampling, token_ids, strict=True)
        if found
    ]
