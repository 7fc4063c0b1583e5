"""Thinking that is ended when its budget is used up."""

from __future__ import annotations

import torch

from sapwood.executor.sampling.thinking_budget import ThinkingBudgets
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart
from sapwood.schema.thinking import ThinkingBudget

VOCABULARY = 32
OPEN, CLOSE, LINE = 20, 21, 22


def started(max_tokens, *, is_open=False, output_ids=(), end=(CLOSE,), forced=(LINE, CLOSE)):
    budgets = ThinkingBudgets()
    budget = ThinkingBudget(
        max_tokens=max_tokens, begin=(OPEN,), end=end, forced=forced, is_open=is_open
    )
    sampling = SamplingParams(thinking_budget=budget)
    budgets.start(row_start(3, sampling, output_ids))
    return budgets


def row_start(row, sampling, output_ids=()):
    options = RequestOptions(sampling=sampling)
    return RowStart(row=row, options=options, seed=0, prompt_ids=[1], output_ids=list(output_ids))


def generate(budgets, wanted, row=3):
    """What comes out if the model wants these tokens."""
    out = []
    for token in wanted:
        logits = torch.zeros(1, VOCABULARY)
        logits[0, token] = 5.0
        budgets.apply(logits, [row], [len(out)])
        chosen = int(logits.argmax())
        budgets.accept([row], [chosen])
        out.append(chosen)
    return out


def test_thinking_ends_after_the_budget():
    assert generate(started(3), [OPEN, 1, 2, 3, 4, 5, 6]) == [OPEN, 1, 2, 3, LINE, CLOSE, 6]


def test_thinking_that_the_prompt_opened():
    assert generate(started(2, is_open=True), [1, 2, 3, 4, 5]) == [1, 2, LINE, CLOSE, 5]


def test_no_thinking_at_all():
    assert generate(started(0, is_open=True), [1, 2, 3]) == [LINE, CLOSE, 3]
    assert generate(started(0), [OPEN, 2, 3, 4]) == [OPEN, LINE, CLOSE, 4]


def test_thinking_that_ends_in_time_is_left_alone():
    wanted = [OPEN, 1, CLOSE, *range(10)]
    assert generate(started(3), wanted) == wanted


def test_a_model_that_does_not_think_is_left_alone():
    assert generate(started(2), range(10)) == list(range(10))


def test_a_retracted_request_goes_on_where_it_was():
    for cut in range(7):
        whole = [OPEN, 1, 2, 3, LINE, CLOSE, 6]
        budgets = started(3, output_ids=whole[:cut])
        assert generate(budgets, [OPEN, 1, 2, 3, 4, 5, 6][cut:]) == whole[cut:]


def test_an_end_of_several_tokens():
    budgets = started(9, end=(CLOSE, LINE), forced=(CLOSE, LINE))
    wanted = [OPEN, 1, CLOSE, 2, CLOSE, LINE, *range(12)]
    assert generate(budgets, wanted) == wanted


def test_other_rows_are_left_alone():
    budgets = started(0, is_open=True)
    assert generate(budgets, [1, 2, 3], row=4) == [1, 2, 3]
    budgets.start(row_start(3, SamplingParams()))
    assert generate(budgets, [1, 2, 3]) == [1, 2, 3]
