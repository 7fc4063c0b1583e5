"""A draft model on the rank: after each step it guesses the tokens of the requests' next steps.

The draft model's keys and values lie in the same pages as the model's, in caches of their own. It
computes every token that the model computes, in the same step, so wherever the model's keys are,
its own are too: after a prefix hit, after a retraction, in a prompt's chunks.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.inputs import StepInputs, build_inputs
from sapwood.executor.rows import RowTable
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import GuessedTokens, ScheduledTokens, StepPlan


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

    def children(
        self,
        logits: Tensor,
        rows: Sequence[int],
        num_outputs: Sequence[int],
        ways: Sequence[Sequence[int]],
        count: int,
    ) -> list[list[tuple[int, float]]]: ...

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
    def right_ids(self) -> list[int]:
        """The ids of its right drafts."""
        return list(self.token_ids[:-1])

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
    ) -> dict[int, GuessedTokens]:
        """Compute the tokens of a step, and guess. Returns guesses by the entry's index.

        sampled  the entries of the plan that brought tokens, in its order"""
        ...


def note(
    found: Tensor, going: Sequence[Sampled], guesses: dict[int, list[int]], sampling: Sampling
) -> set[int]:
    """Append each token of found [len(going)] to its guesses. Returns the rows whose output ends
    there."""
    token_ids = found.tolist()
    for one, token_id in zip(going, token_ids, strict=True):
        guesses[one.index].append(token_id)
    return sampling.take([one.entry.row for one in going], token_ids)


def as_chains(guesses: Mapping[int, list[int]]) -> dict[int, GuessedTokens]:
    return {index: GuessedTokens(token_ids) for index, token_ids in guesses.items()}


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
