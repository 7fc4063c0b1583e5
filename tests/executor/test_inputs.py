from __future__ import annotations

import torch

from sapwood.executor.inputs import build_inputs
from sapwood.executor.rows import RowTable
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart, ScheduledTokens, StepPlan

CPU = torch.device("cpu")
PAGE = 4


def entry(row: int, position: int, token_ids: list[int], pages: list[int], output: int | None):
    return ScheduledTokens(
        row=row,
        position=position,
        token_ids=token_ids,
        first_page=0,
        pages=pages,
        num_output=output,
    )


def build(rows: RowTable, scheduled: list[ScheduledTokens]):
    for one in scheduled:
        rows.take_pages(one)
    plan = StepPlan(step=0, starts=[], scheduled=scheduled)
    return build_inputs(plan, rows, page_size=PAGE, kv_caches=[], device=CPU)


def test_a_mixed_batch() -> None:
    rows = RowTable(num_rows=4, max_pages=8, device=CPU)
    rows.last_tokens[2] = 77
    inputs = build(
        rows,
        [
            entry(2, 5, [], [9, 3], 1),
            entry(0, 0, [50], [6], 0),
            entry(1, 3, [11, 12, 13], [4, 5], None),
        ],
    )
    assert [one.row for one in inputs.sampling] == inputs.sampling_rows.tolist() == [2, 0]
    batch = inputs.batch
    assert batch.token_ids.tolist() == [77, 50, 11, 12, 13]
    assert batch.positions.tolist() == [5, 0, 3, 4, 5]
    assert batch.write_index.tolist() == [3 * 4 + 1, 6 * 4, 4 * 4 + 3, 5 * 4, 5 * 4 + 1]
    attention = batch.attention
    assert attention.query_lens == (1, 1, 3)
    assert attention.context_lens == (6, 1, 6)
    assert attention.num_decodes == 2
    assert attention.query_start.tolist() == [0, 1, 2, 5]
    assert attention.context_len.tolist() == [6, 1, 6]
    assert attention.page_table.tolist() == [[9, 3], [6, 0], [4, 5]]
    assert attention.host_page_table is not None
    assert attention.host_page_table.tolist() == attention.page_table.tolist()
    assert batch.logits_index.tolist() == [0, 1]
    assert attention.page_table.dtype == attention.query_start.dtype == torch.int32


def test_pages_of_the_previous_request_in_a_row_are_not_seen() -> None:
    rows = RowTable(num_rows=2, max_pages=8, device=CPU)
    build(rows, [entry(0, 0, list(range(16)), [1, 2, 3, 4], 0)])
    rows.start(
        RowStart(
            row=0,
            options=RequestOptions(sampling=SamplingParams()),
            seed=1,
            prompt_ids=[1],
            output_ids=[],
        )
    )
    rows.start(
        RowStart(
            row=1,
            options=RequestOptions(sampling=SamplingParams()),
            seed=1,
            prompt_ids=[1],
            output_ids=[],
        )
    )
    batch = build(rows, [entry(0, 0, [1, 2], [7], 0), entry(1, 0, [0] * 9, [6, 5, 8], 0)]).batch
    assert batch.attention.page_table.tolist() == [[7, 0, 0], [6, 5, 8]]


def test_a_change_in_the_middle_of_a_table() -> None:
    rows = RowTable(num_rows=1, max_pages=8, device=CPU)
    build(rows, [entry(0, 0, list(range(12)), [1, 2, 3], None)])
    change = ScheduledTokens(
        row=0, position=12, token_ids=[5], first_page=1, pages=[8, 3, 4], num_output=0
    )
    batch = build(rows, [change]).batch
    assert batch.attention.page_table.tolist() == [[1, 8, 3, 4]]
    assert batch.write_index.tolist() == [16]
