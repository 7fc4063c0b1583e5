"""Tokens of a picture see one another; everything else is as causal attention has it."""

from __future__ import annotations

import pytest
import torch

from sapwood.kernels.attention_batch import AttentionBatch, AttentionTraits, SeenBothWays
from sapwood.layers.both_ways import attend_both_ways

PAGE, HEADS, KV_HEADS, SIZE = 4, 4, 2, 8
LENGTH, FIRST, COUNT = 21, 9, 6


@pytest.mark.parametrize("window", [None, 5, 50])
def test_rows_of_a_picture_equal_masked_attention(window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    pages = torch.tensor([[5, 1, 3, 0, 2, 4]], dtype=torch.int32)
    keys, values = (torch.randn(6, KV_HEADS, PAGE, SIZE, generator=generator) for _ in range(2))
    q = torch.randn(LENGTH, HEADS, SIZE, generator=generator)
    batch = AttentionBatch(
        page_table=pages,
        query_start=torch.tensor([0, LENGTH], dtype=torch.int32),
        context_len=torch.tensor([LENGTH], dtype=torch.int32),
        query_lens=(LENGTH,),
        context_lens=(LENGTH,),
        num_decodes=0,
        both_ways=(SeenBothWays(request=0, start=FIRST, end=FIRST + COUNT, first=FIRST),),
    )
    out = torch.zeros_like(q)
    traits = AttentionTraits(window=window)
    attend_both_ways(out, q, keys, values, batch, SIZE**-0.5, traits)

    def in_order(cache: torch.Tensor) -> torch.Tensor:
        flat = cache[pages[0].long()].transpose(0, 1).flatten(1, 2)[:, :LENGTH]
        return flat.repeat_interleave(HEADS // KV_HEADS, dim=0)

    at = torch.arange(LENGTH)
    picture = (at >= FIRST) & (at < FIRST + COUNT)
    seen = (at[:, None] >= at) | (picture[:, None] & picture)
    if window is not None:
        seen &= at[:, None] - at < window
    scores = (q.transpose(0, 1) @ in_order(keys).transpose(1, 2)) * SIZE**-0.5
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ in_order(values)
    assert torch.allclose(out[picture], expected.transpose(0, 1)[picture], atol=1e-5)
    assert not out[~picture].any()
