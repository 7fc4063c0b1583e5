"""A prefill and a few decodes before the first request, which would else pay for first uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sapwood.schema.request import Embed, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart, ScheduledTokens, StepPlan, StepResult

NUM_DECODES = 2
NUM_MEASURED = 3
"""Steps of one size, of which the shortest counts."""


def warm_up(
    execute: Callable[[StepPlan], StepResult], *, num_windows: int = 0, slot: int = -1
) -> None:
    """Run steps in row 0 and page 0 of every pool, which must be unused; nobody reads the results.

    num_windows  window pools of the model
    slot         0 if the model keeps states, else -1
    """
    start = _start(SamplingParams(temperature=1.0, top_p=0.9))
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


def _start(sampling: SamplingParams) -> RowStart:
    options = RequestOptions(sampling=sampling)
    return RowStart(row=0, options=options, seed=0, prompt_ids=[0], output_ids=[])


def measure_steps(
    execute: Callable[[StepPlan], StepResult],
    sizes: Sequence[int],
    *,
    page_size: int,
    num_windows: int = 0,
    slot: int = -1,
    most_s: float = 1.0,
) -> dict[int, float]:
    """Seconds of a step that verifies a request's drafts, by its new tokens: after `warm_up`, in
    the first pages of every pool and row 0, which must be unused.

    sizes   new tokens, ascending; those that do not fit into `most_s` are left out
    most_s  seconds that may be spent, besides the first size's
    """
    pages = list(range(-(-sizes[-1] // page_size)))

    def plan(size: int, starts: list[RowStart]) -> StepPlan:
        entry = ScheduledTokens(
            row=0,
            position=0,
            token_ids=[0],
            draft_ids=[0] * (size - 1),
            first_page=0,
            pages=pages,
            windows=[(0, pages)] * num_windows,
            slot=slot,
            num_output=1,
        )
        return StepPlan(step=-1, starts=starts, scheduled=[entry])

    execute(plan(1, [_start(SamplingParams(temperature=0.0))]))
    found: dict[int, float] = {}
    began_s = time.perf_counter()
    for size in sizes:
        times: list[float] = []
        for _ in range(NUM_MEASURED):
            start_s = time.perf_counter()
            if found and start_s - began_s > most_s:
                return found
            execute(plan(size, []))
            times.append(time.perf_counter() - start_s)
        found[size] = min(times)
    return found


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
