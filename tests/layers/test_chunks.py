"""Attention within chunks is attention of one request per chunk."""

from __future__ import annotations

import pytest
import torch

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.layers.chunks import in_chunks


def batch_of(query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> AttentionBatch:
    """Request r has the pages 10 r + 1, 10 r + 2, …"""
    return AttentionBatch(
        page_table=torch.tensor(
            [[10 * row + page + 1 for page in range(6)] for row in range(len(query_lens))],
            dtype=torch.int32,
        ),
        query_start=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        context_len=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=query_lens.count(1),
    )


def test_a_request_is_cut_where_chunks_begin() -> None:
    """Pages of 4 tokens and chunks of 8: a decode within the third chunk, one that opens it, and 13
    new tokens after 5."""
    found = in_chunks(batch_of((1, 1, 13), (23, 17, 18)), 8, 4)
    assert found.query_lens == (1, 1, 3, 8, 2)
    assert found.context_lens == (7, 1, 8, 8, 2)
    assert found.query_start.tolist() == [0, 1, 2, 5, 13, 15]
    assert found.context_len.tolist() == [7, 1, 8, 8, 2]
    assert found.num_decodes == 2
    assert found.page_table.dtype == found.query_start.dtype == torch.int32
    assert found.page_table.tolist() == [[5, 6], [15, 16], [21, 22], [23, 24], [25, 26]]


def test_what_is_within_one_chunk_stays_as_it_is() -> None:
    batch = batch_of((3, 2), (3, 7))
    found = in_chunks(batch, 8, 4)
    assert found.query_lens == batch.query_lens
    assert found.context_lens == batch.context_lens
    assert torch.equal(found.page_table, batch.page_table[:, :2])


def test_all_layers_of_a_step_share_the_result() -> None:
    batch = batch_of((3,), (3,))
    assert in_chunks(batch, 8, 4) is in_chunks(batch, 8, 4)
    assert in_chunks(batch, 16, 4) is not in_chunks(batch, 8, 4)


def test_a_chunk_does_not_begin_within_a_page() -> None:
    with pytest.raises(ValueError, match="no number of whole pages of 3"):
        in_chunks(batch_of((1,), (1,)), 8, 3)
