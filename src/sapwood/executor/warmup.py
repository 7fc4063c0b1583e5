"""A prefill and a few decodes before the first request, which would else pay for first uses."""

from __future__ import annotations

from collections.abc import Callable

from sapwood.schema.request import Embed, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart, ScheduledTokens, StepPlan, StepResult

NUM_DECODES = 2


def warm_up(
    execute: Callable[[StepPlan], StepResult], *, num_windows: int = 0, slot: int = -1
) -> None:
    """Run steps in row 0 and page 0 of every pool, which must be unused; nobody reads the results.

    num_windows  window pools of the model
    slot         0 if the model keeps states, else -1
    """
    start = RowStart(
        row=0,
        options=RequestOptions(sampling=SamplingParams(temperature=1.0, top_p=0.9)),
        seed=0,
        prompt_ids=[0],
        output_ids=[],
    )
    entry = ScheduledTokens(
        row=0,
        position=0,
        token_ids=[0],
        first_page=0,
        pages=[0],
        windows=[(0, [0])] * num_windows,
        slot=slot,
        num_output=0,
    )
    execute(StepPlan(step=-1, starts=[start], scheduled=[entry]))
    for _ in range(NUM_DECODES):
        again = ScheduledTokens(
            row=0, position=0, token_ids=[], first_page=0, pages=[], slot=slot, num_output=1
        )
        execute(StepPlan(step=-1, starts=[], scheduled=[again]))


def warm_up_pooling(
    execute: Callable[[StepPlan], StepResult], *, num_windows: int = 0, slot: int = -1
) -> None:
    """Warm up a model that makes embeddings or scores; num_windows and slot as in `warm_up`."""
    start = RowStart(
        row=0,
        options=RequestOptions(sampling=SamplingParams(max_new_tokens=0), embed=Embed()),
        seed=0,
        prompt_ids=[0],
        output_ids=[],
    )
    entry = ScheduledTokens(
        row=0,
        position=0,
        token_ids=[0],
        first_page=0,
        pages=[0],
        windows=[(0, [0])] * num_windows,
        slot=slot,
        num_output=None,
        answers=True,
    )
    execute(StepPlan(step=-1, starts=[start], scheduled=[entry]))
