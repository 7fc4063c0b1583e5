from __future__ import annotations

import numpy as np
import pytest
import torch

from sapwood.executor.rows import RowTable
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart, ScheduledTokens


def table() -> RowTable:
    return RowTable(num_rows=3, max_pages=4, device=torch.device("cpu"))


def pages(row: int, first_page: int, taken: list[int]) -> ScheduledTokens:
    return ScheduledTokens(
        row=row, position=0, token_ids=[1], first_page=first_page, pages=taken, num_output=None
    )


def test_shapes_and_types() -> None:
    rows = table()
    assert (rows.page_table.shape, rows.page_table.dtype) == ((3, 4), np.int32)
    assert (rows.last_tokens.shape, rows.last_tokens.dtype) == ((3,), torch.int64)


def test_a_request_takes_a_row() -> None:
    rows = table()
    sampling = SamplingParams(temperature=0.5)
    start = RowStart(
        row=1, options=RequestOptions(sampling=sampling), seed=7, prompt_ids=[1], output_ids=[]
    )
    rows.start(start)
    assert rows.sampling[1] is sampling
    assert rows.seeds.tolist() == [0, 7, 0]


@pytest.mark.parametrize(
    ("seed", "kept"), [(-1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (-(2**63), 2**63)]
)
def test_every_seed_that_a_request_may_bring_fits(seed: int, kept: int) -> None:
    rows = table()
    rows.start(
        RowStart(
            row=0,
            options=RequestOptions(sampling=SamplingParams()),
            seed=seed,
            prompt_ids=[1],
            output_ids=[],
        )
    )
    assert int(rows.seeds[0]) == kept


def test_pages_replace_the_table_from_where_they_say() -> None:
    rows = table()
    rows.take_pages(pages(1, 0, [5, 6]))
    rows.take_pages(pages(1, 2, [7]))
    assert rows.page_table[1].tolist() == [5, 6, 7, 0]
    rows.take_pages(pages(1, 1, [9]))
    assert rows.page_table[1].tolist() == [5, 9, 7, 0]
    rows.take_pages(pages(1, 3, []))
    assert rows.page_table[1].tolist() == [5, 9, 7, 0]
    assert not rows.page_table[[0, 2]].any()
