"""What the scheduler asks of every rank for one step, and what comes back.

A rank keeps a row of state per running request: its page table, its sampling parameters and the
token that it sampled last. A plan carries only what changed. Plans are executed in order, so a page
or row that a plan frees may be used by the next one at once, even while the first is in flight.
"""

from __future__ import annotations

import msgspec

from sapwood.schema.sampling import SamplingParams


class RowStart(msgspec.Struct, frozen=True, kw_only=True):
    """A request takes this row from this step on.

    prompt_ids  of the request; output_ids: what it had put out when it was retracted, else empty
    seed        of its random numbers
    """

    row: int
    sampling: SamplingParams
    seed: int
    prompt_ids: list[int]
    output_ids: list[int]


class ScheduledTokens(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of the request in `row`.

    position    index of the first new token in the request
    token_ids   ids of the new tokens; empty: one token, the one that this row sampled last
    first_page  index in the row's page table from which `pages` replaces its entries
    num_output  output tokens before the one that this step samples; None: nothing is sampled
    """

    row: int
    position: int
    token_ids: list[int]
    first_page: int
    pages: list[int]
    num_output: int | None

    @property
    def num_new(self) -> int:
        return len(self.token_ids) or 1


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `scheduled` has the requests with one new token first."""

    step: int
    starts: list[RowStart]
    scheduled: list[ScheduledTokens]


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled token id for each entry of `scheduled` that samples, in their order."""

    step: int
    token_ids: list[int]
