"""Attention to latent rows against the reference's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.triton import indexer, latent
from sapwood.kernels.triton.ops import TritonKernels
from tests.kernels.test_latent import REFERENCE, closeness, drawn, filled_cache
from tests.models.lm.harness import NewTokens, make_attention_batch
from tests.tiers import sweep

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
TRITON = TritonKernels()
REQUESTS = [
    NewTokens([0], 139, tuple(range(19, 10, -1))),
    NewTokens([0] * 2, 13, (20,)),
    NewTokens([0] * 3, 0, (21,)),
]
NUM_TOKENS, NUM_DECODES = 6, 1


def on(batch: AttentionBatch, device: torch.device) -> AttentionBatch:
    return replace(
        batch,
        page_table=batch.page_table.to(device),
        query_start=batch.query_start.to(device),
        context_len=batch.context_len.to(device),
    )


@sweep(
    strength=1,
    heads=[3, 16, 70],
    sizes=[(96, 64), (80, 48)],
    kind=["dense", "int8", "float8_e4m3fn"],
    dtype=[torch.float32, torch.bfloat16],
    splits=[True, False],
)
def test_attention_to_latent_rows(
    heads: int,
    sizes: tuple[int, int],
    kind: str,
    dtype: torch.dtype,
    splits: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decode of two parts, a chunk with a past, and a new prompt, in one step."""
    if not splits:
        monkeypatch.setattr(latent, "DECODE", type(latent.DECODE)(programs=1, min_chunk=1 << 20))
    row, rank = sizes
    stored = dtype if kind == "dense" else getattr(torch, kind)
    cache = filled_cache(row, rank, dtype, stored)
    q, scale = drawn(NUM_TOKENS, heads, row, dtype=dtype, seed=2), row**-0.5
    batch = make_attention_batch(REQUESTS, num_decodes=NUM_DECODES)
    expected = REFERENCE.latent_attention(q.clone(), cache, batch, scale, rank)
    batch = on(make_attention_batch(REQUESTS, num_decodes=NUM_DECODES), device)
    got = TRITON.latent_attention(q.to(device), cache.to(device), batch, scale, rank)
    torch.testing.assert_close(got.cpu(), expected, **closeness(dtype))


@sweep(
    strength=1,
    index=[(12, 64), (70, 48), (3, 16)],
    num_chosen=[1, 4, 16, 64, 200],
    kind=["dense", "int8", "float8_e4m3fn"],
    dtype=[torch.float32, torch.bfloat16],
    at_once=[1 << 20, 300],
)
def test_chosen_keys(
    index: tuple[int, int],
    num_chosen: int,
    kind: str,
    dtype: torch.dtype,
    at_once: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same keys as the reference's, in their order, and attention to these alone: of a decode
    whose scores are computed by two programs and looked at in several blocks, a chunk with a past,
    and a new prompt."""
    monkeypatch.setattr(indexer, "_SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(indexer, "_KEYS", 96)
    monkeypatch.setattr(indexer, "_BLOCK", 64)
    (index_heads, index_dim), heads, row, rank = index, 3, 96, 64
    stored = dtype if kind == "dense" else getattr(torch, kind)
    keys = filled_cache(index_dim, index_dim - 8, dtype, stored)
    cache = filled_cache(row, rank, dtype, stored)
    q = drawn(NUM_TOKENS, index_heads, index_dim, dtype=dtype, seed=5)
    weights = drawn(NUM_TOKENS, index_heads, dtype=torch.float32, seed=6)
    rows, scale = drawn(NUM_TOKENS, heads, row, dtype=dtype, seed=7), row**-0.5
    batch = make_attention_batch(REQUESTS, num_decodes=NUM_DECODES)
    expected = REFERENCE.choose_keys(q, weights, keys, batch, num_chosen)
    wanted = REFERENCE.sparse_latent_attention(rows, cache, batch, scale, rank, expected)
    batch = on(make_attention_batch(REQUESTS, num_decodes=NUM_DECODES), device)
    got = TRITON.choose_keys(q.to(device), weights.to(device), keys.to(device), batch, num_chosen)
    assert torch.equal(got.cpu(), expected)
    found = TRITON.sparse_latent_attention(
        rows.to(device), cache.to(device), batch, scale, rank, got
    )
    torch.testing.assert_close(found.cpu(), wanted, **closeness(dtype))


def test_of_equal_keys_the_first_ones_are_chosen(device: torch.device) -> None:
    """All scores are 0 but a few, some of which are below; two requests share their first page."""
    keys = torch.zeros(8, 1, 16, 16, device=device)
    keys[5, 0, 3, 0], keys[5, 0, 9, 1], keys[6, 0, 2, 0] = 1.0, 1.0, 2.0
    q = torch.zeros(3, 2, 16, device=device)
    q[:, 0, 0], q[:, 1, 1] = 1.0, 1.0
    weights = torch.tensor([[1.0, -1.0]] * 3, device=device)
    requests = [NewTokens([0], 19, (5, 6)), NewTokens([0], 12, (5,)), NewTokens([0], 2, (5,))]
    batch = on(make_attention_batch(requests, num_decodes=3), device)
    got = TRITON.choose_keys(q, weights, keys, batch, 4)
    assert got.tolist() == [[0, 1, 3, 18], [0, 1, 2, 3], [0, 1, 2, -1]]


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    batch = on(make_attention_batch(REQUESTS, num_decodes=NUM_DECODES), device)
    cache = torch.zeros(26, 1, 16, 64, device=device)
    q = torch.zeros(NUM_TOKENS, 2, 96, device=device)
    with pytest.raises(ValueError, match="must be"):
        TRITON.latent_attention(q, cache, batch, 0.1, 64)
