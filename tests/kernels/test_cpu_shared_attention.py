"""Decodes that attend to shared pages together: the results of attending one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.cpu.shared import groups_of_decodes
from sapwood.kernels.kv_cache import kv_cache_shape
from sapwood.kernels.reference import ReferenceKernels
from tests.tiers import examples

pytestmark = pytest.mark.skipif(not CpuKernels.usable_isas(), reason="no native kernels")

_PAGE = 16
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}


def make_batch(groups: list[tuple[int, int]], own: list[int], extends: list[int]) -> AttentionBatch:
    """groups: (requests, shared pages) of decodes, which come in turn; own: what each has of its
    own; extends: requests with so many new tokens after one page."""
    next_page = 1
    rows: list[list[int]] = []
    contexts: list[int] = []
    for count, num_shared in groups:
        prefix = list(range(next_page, next_page + num_shared))
        next_page += num_shared
        for _ in range(count):
            tokens = own[len(rows) % len(own)]
            num_own = -(-tokens // _PAGE)
            rows.append(prefix + list(range(next_page, next_page + num_own)))
            contexts.append(num_shared * _PAGE + tokens)
            next_page += num_own
    order = sorted(range(len(rows)), key=lambda row: (row * 7) % (len(rows) + 1))
    rows, contexts = [rows[i] for i in order], [contexts[i] for i in order]
    queries = [1] * len(rows) + extends
    for tokens in extends:
        contexts.append(_PAGE + tokens)
        rows.append(list(range(next_page, next_page + 1 + -(-tokens // _PAGE))))
        next_page += len(rows[-1])
    table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for row, pages in zip(table, rows, strict=True):
        row[: len(pages)] = pages
    return AttentionBatch(
        page_table=torch.from_numpy(table.copy()),
        query_start=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32),
        context_len=torch.tensor(contexts, dtype=torch.int32),
        query_lens=tuple(queries),
        context_lens=tuple(contexts),
        num_decodes=len(order),
        host_page_table=table,
    )


def attend(
    batch: AttentionBatch, isa: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, num_kv_heads = heads
    shape = kv_cache_shape(int(batch.page_table.max()) + 1, num_kv_heads, _PAGE, head_dim)
    keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    q = torch.randn(sum(batch.query_lens), num_heads, head_dim).to(dtype)
    kernels = CpuKernels(isa=isa, num_threads=2)
    found = kernels.paged_attention(q, keys, values, batch, head_dim**-0.5)
    expected = ReferenceKernels().paged_attention(q, keys, values, batch, head_dim**-0.5)
    return found.float(), expected.float()


@pytest.mark.parametrize("isa", CpuKernels.usable_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((4, 4), 32), ((16, 2), 96)])
def test_results_are_those_of_each_alone(
    isa: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> None:
    torch.manual_seed(3)
    # More requests than fit into a tile, a second group, some that share nothing, and extends.
    batch = make_batch([(45, 20), (12, 9), (1, 3)], [1, 16, 17, 300], [5, 40])
    assert len(groups_of_decodes(batch, _PAGE, heads[0] // heads[1])) == 2
    found, expected = attend(batch, isa, dtype, heads, head_dim)
    assert (found - expected).abs().max() <= _TOLERANCE[dtype] * expected.abs().max()


@given(
    groups=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 24)), min_size=1, max_size=4),
    own=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    extends=st.lists(st.integers(2, 20), max_size=2),
)
@settings(max_examples=examples(100))
def test_any_batch(groups: list[tuple[int, int]], own: list[int], extends: list[int]) -> None:
    torch.manual_seed(4)
    batch = make_batch(groups, own, extends)
    found, expected = attend(batch, "", torch.float32, (6, 2), 32)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_shared_pages_are_read_once() -> None:
    """The keys of the group are in tasks of their own, not in each request's."""
    batch = make_batch([(32, 64)], [8], [])
    alone = replace(batch, host_page_table=None, cache={})
    kernels = CpuKernels(num_threads=1)
    shape = (4, 1, 32, _PAGE, 200)
    assert kernels.plan(alone, shape).num_tasks(0) == 32
    # 128 rows in two tiles, each over 1,024 keys in parts of 256 or more
    assert 32 + 2 <= kernels.plan(batch, shape).num_tasks(0) <= 32 + 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_lens": (2, 1)}, "needs one"),
        ({"context_lens": (10, 33)}, "after these pages"),
    ],
)
def test_groups_are_checked(change: dict[str, tuple[int, ...]], message: str) -> None:
    from sapwood.kernels.cpu import _native

    batch = make_batch([(2, 2)], [1], [])
    lengths = {"query_lens": (1, 1), "context_lens": (33, 33)} | change
    table = batch.page_table
    with pytest.raises(ValueError, match=message):
        _native.AttentionPlan(
            _native.Context("", 1), 4, 4, 32, _PAGE, 10,
            table.data_ptr(), table.stride(0), table.shape[1],
            lengths["query_lens"], lengths["context_lens"], [((0, 1), 2)], 0,
        )  # fmt: skip


def test_groups_with_other_pages_are_refused() -> None:
    from sapwood.kernels.cpu import _native

    table = torch.tensor([[1, 2, 3], [1, 4, 5]], dtype=torch.int32)
    for groups in ([((0, 1), 2)], [((0, 1), 1), ((0, 1), 1)]):
        with pytest.raises(ValueError, match="other pages"):
            _native.AttentionPlan(
                _native.Context("", 1), 4, 4, 32, _PAGE, 10,
                table.data_ptr(), 3, 3, (1, 1), (33, 33), groups, 0,
            )  # fmt: skip
