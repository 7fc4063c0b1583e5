"""What the scheduler asks of every rank for one step, and what comes back.

A rank keeps a row of state per running request: its page table, its sampling parameters and the
token that it sampled last. A plan carries only what changed. Plans are executed in order, so a page
or row that a plan frees may be used by the next one at once, even while the first is in flight.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.request import Embed
from sapwood.schema.sampling import SamplingParams


class RowStart(msgspec.Struct, frozen=True, kw_only=True):
    """A request takes this row from this step on.

    prompt_ids  of the request; empty if there are input_embeds, which are as in `Generate`
    output_ids  what it had put out when it was retracted, else empty
    seed        of its random numbers
    logprobs    which log probabilities it wants; None: none
    embed       set if it wants numbers instead of output tokens
    return_hidden_states  of each of its tokens: none is put out without having been computed
    """

    row: int
    sampling: SamplingParams
    seed: int
    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: LogprobOptions | None = None
    embed: Embed | None = None
    input_embeds: list[bytes] = []
    return_hidden_states: bool = False


class ScheduledTokens(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of the request in `row`.

    position    index of the first new token in the request
    token_ids   ids of the new tokens; empty: one token, the one that this row sampled last
    first_page  index in the row's page table from which `pages` replaces its entries
    num_output  output tokens before the one that this step samples; None: nothing is sampled
    num_scored  so many of the new tokens, from `first_scored` in the request on, are prompt tokens
                whose successors' log probabilities are wanted
    num_hidden  the hidden states of so many of the new tokens, the last ones, are wanted
    answers     the prompt ends with these tokens, and its numbers are wanted
    """

    row: int
    position: int
    token_ids: list[int]
    first_page: int
    pages: list[int]
    num_output: int | None
    first_scored: int = 0
    num_scored: int = 0
    num_hidden: int = 0
    answers: bool = False

    @property
    def num_new(self) -> int:
        return len(self.token_ids) or 1

    @property
    def end(self) -> int:
        """Tokens of the request that are computed after this step."""
        return self.position + self.num_new

    @property
    def first_hidden(self) -> int:
        """Index in the request of the first token whose hidden state is wanted."""
        return self.end - self.num_hidden


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `scheduled` has the requests with one new token first; it may be empty.

    ends  rows whose requests have left since the plan before and had a grammar, whose state the
          rank then drops; before any of them starts anew
    """

    step: int
    starts: list[RowStart]
    scheduled: list[ScheduledTokens]
    ends: list[int] = []


class EntryLogprobs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Log probabilities that one entry of `scheduled` brought.

    output  of the token that it sampled
    prompt  of the prompt tokens that follow its scored ones
    """

    output: TokenLogprobs | None = None
    prompt: TokenLogprobs | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled token id for each entry of `scheduled` that samples, in their order.

    logprobs  by the entry's index in `scheduled`, for those that want some
    hidden_states  by the entry's index, those that are wanted: fp32, little endian, one per token
    failures  by the entry's index: why its request cannot go on, though others can
    values    by the entry's index, the numbers of those that answer: fp32, little endian
    forced    by the entry's index, tokens that come after the sampled one in any case, because its
              grammar leaves no choice; not computed yet
    """

    step: int
    token_ids: list[int]
    logprobs: dict[int, EntryLogprobs] = {}
    hidden_states: dict[int, list[bytes]] = {}
    failures: dict[int, str] = {}
    values: dict[int, bytes] = {}
    forced: dict[int, list[int]] = {}


class StepHandle(Protocol):
    """A step that has been started; a concurrent.futures.Future is such a handle too."""

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled; raises what the step raised."""
        ...
