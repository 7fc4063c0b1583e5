"""Attention of every token to all tokens of its text."""

from __future__ import annotations

import pytest
import torch

from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.texts import group_texts

CPU = torch.device("cpu")
REFERENCE = ReferenceKernels()


@pytest.mark.parametrize("lengths", [(4,), (3, 3), (1, 5, 2, 5, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_attends_to_its_own_text_only(
    any_kernels: Kernels, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 8, generator=generator).to(dtype) for _ in range(3))
    texts = group_texts(lengths, CPU)
    parts = zip(*(x.float().split(lengths) for x in (q, k, v)), strict=True)
    want = torch.cat(
        [
            torch.einsum("hqk,khd->qhd", (0.3 * torch.einsum("qhd,khd->hqk", a, b)).softmax(-1), c)
            for a, b, c in parts
        ]
    )
    for kernels in (any_kernels, REFERENCE):
        got = kernels.bidirectional_attention(q, k, v, texts, 0.3)
        assert got.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


def test_texts_are_grouped_by_length() -> None:
    groups = group_texts((2, 1, 2), CPU)
    assert {group.length: group.rows.tolist() for group in groups} == {2: [0, 1, 3, 4], 1: [2]}
    [only] = group_texts((3, 3), CPU)
    assert only.rows is None
