"""Attention to latent rows against the reference's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.kernels.interface import AttentionBatch
from sapwood.kernels.triton import latent
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


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    batch = on(make_attention_batch(REQUESTS, num_decodes=NUM_DECODES), device)
    cache = torch.zeros(26, 1, 16, 64, device=device)
    q = torch.zeros(NUM_TOKENS, 2, 96, device=device)
    with pytest.raises(ValueError, match="must be"):
        TRITON.latent_attention(q, cache, batch, 0.1, 64)
