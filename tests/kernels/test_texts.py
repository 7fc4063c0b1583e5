"""Attention of every token to all tokens of its text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.texts import EqualTexts, group_texts

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


@pytest.fixture(params=CpuKernels.usable_isas())
def table_kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(isa=request.param, num_threads=2)


def of_lengths(
    lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of texts in a row, as parts of one tensor: tokens lie apart."""
    generator = torch.Generator().manual_seed(1)
    together = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator).to(dtype)
    q, k, v = together.unbind(1)
    return 3 * q, k, v


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [((70, 33, 70), 2, 72), ((1100,), 1, 64), ((31, 2), 3, 20), ((256, 256), 1, 128)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_texts_and_odd_heads(
    table_kernels: CpuKernels,
    lengths: tuple[int, ...],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    q, k, v = of_lengths(lengths, heads, head_dim, dtype)
    texts = group_texts(lengths, CPU)
    scale = head_dim**-0.5
    got = table_kernels.bidirectional_attention(q, k, v, texts, scale)
    want = REFERENCE.bidirectional_attention(q.float(), k.float(), v.float(), texts, scale)
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_is_the_same_beside_others_and_with_any_threads(
    table_kernels: CpuKernels, dtype: torch.dtype
) -> None:
    lengths = (150, 40, 150)
    q, k, v = of_lengths(lengths, 2, 48, dtype)
    together = table_kernels.bidirectional_attention(q, k, v, group_texts(lengths, CPU), 0.2)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        alone = table_kernels.bidirectional_attention(
            q[own], k[own], v[own], group_texts((length,), CPU), 0.2
        )
        assert torch.equal(alone, together[own])
        start += length
    table_kernels.set_num_threads(1)
    by_one = table_kernels.bidirectional_attention(q, k, v, group_texts(lengths, CPU), 0.2)
    assert torch.equal(by_one, together)


def test_rows_and_shapes_that_do_not_fit_are_refused(table_kernels: CpuKernels) -> None:
    q, k, v = of_lengths((6,), 1, 8, torch.float32)
    with pytest.raises(IndexError, match="row of a text"):
        table_kernels.bidirectional_attention(q, k, v, [EqualTexts(2, torch.tensor([0, 6]))], 1.0)
    with pytest.raises(IndexError, match="ends behind"):
        table_kernels.bidirectional_attention(q, k, v, [EqualTexts(4, None)], 1.0)
    with pytest.raises(ValueError, match="no whole texts"):
        table_kernels.bidirectional_attention(
            q, k, v, [EqualTexts(2, torch.tensor([0, 1, 2]))], 1.0
        )
    with pytest.raises(ValueError, match="do not fit"):
        table_kernels.bidirectional_attention(q, k[:5], v, [EqualTexts(6, None)], 1.0)


def test_texts_are_grouped_by_length() -> None:
    groups = group_texts((2, 1, 2), CPU)
    assert {group.length: group.rows.tolist() for group in groups} == {2: [0, 1, 3, 4], 1: [2]}
    [only] = group_texts((3, 3), CPU)
    assert only.rows is None
