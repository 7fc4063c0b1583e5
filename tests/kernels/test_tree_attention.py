"""Attention among new tokens that are a tree: each sees what it would see if only the tokens that
it follows were there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch, AttentionTraits
from sapwood.kernels.kv_cache import dequantize_pages, kv_cache_shape, move_tokens, write
from sapwood.kernels.reference import ReferenceKernels
from sapwood.schema.draft_tree import ROOT, seen_nodes
from tests.kernels.conftest import IMPLEMENTATIONS, make_kernels
from tests.kernels.test_cpu_shared_attention import make_batch
from tests.tiers import examples

REFERENCE = ReferenceKernels()
PAGE, HEADS, KV_HEADS, HEAD_DIM = 16, 6, 2, 32
SCALE = HEAD_DIM**-0.5
TRAITS = AttentionTraits(soft_cap=5.0, sinks=torch.linspace(-1, 1, HEADS))


def with_trees(batch: AttentionBatch, trees: Sequence[Sequence[int]]) -> AttentionBatch:
    """The requests with several new tokens have these trees of drafts after their first one."""
    sees: list[int] = []
    following = iter(trees)
    for num_new in batch.query_lens:
        if num_new == 1 or num_new > 64:
            sees += [-1] * num_new
        else:
            sees += [-1, *(1 | nodes << 1 for nodes in seen_nodes(next(following)[: num_new - 1]))]
    as_int64 = [one - (1 << 64) if one >= 1 << 63 else one for one in sees]
    return replace(batch, sees=torch.tensor(as_int64))


def filled(batch: AttentionBatch, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Keys and values, all of them random."""
    shape = kv_cache_shape(
        int(batch.page_table.max()) + 1, KV_HEADS, PAGE, HEAD_DIM, dtype or torch.float32
    )
    if dtype is None:
        return [torch.randn(shape) for _ in "kv"]
    caches = [torch.zeros(shape, dtype=torch.uint8).view(dtype) for _ in "kv"]
    for cache in caches:
        write(
            cache, torch.arange(shape[0] * PAGE), torch.randn(shape[0] * PAGE, KV_HEADS, HEAD_DIM)
        )
    return caches


def draw_tree(random: torch.Generator, size: int) -> list[int]:
    return [int(torch.randint(ROOT, node, (1,), generator=random)) for node in range(size)]


@pytest.mark.parametrize("traits", [AttentionTraits(), TRAITS], ids=["plain", "cap and sinks"])
def test_a_node_sees_its_own_way_only(traits: AttentionTraits) -> None:
    """The reference with a tree, against itself with one chain for each node."""
    torch.manual_seed(1)
    parents = [ROOT, 0, ROOT, 1, 0, 2]
    num_cached, num_new = 19, 1 + len(parents)
    keys, values = (torch.randn(KV_HEADS, num_cached + num_new, HEAD_DIM) for _ in "kv")
    q = torch.randn(num_new, HEADS, HEAD_DIM)

    def attend(tokens: list[int], rows: list[int], sees: Tensor | None) -> Tensor:
        length = num_cached + len(rows)
        batch = AttentionBatch(
            page_table=torch.zeros(1, 1, dtype=torch.int32),
            query_start=torch.tensor([0, len(rows)], dtype=torch.int32),
            context_len=torch.tensor([length], dtype=torch.int32),
            query_lens=(len(rows),),
            context_lens=(length,),
            num_decodes=0,
            sees=sees,
        )
        k, v = (cache[None, :, tokens] for cache in (keys, values))
        return REFERENCE.paged_attention(q[rows], k, v, batch, SCALE, traits)

    sees = torch.tensor([-1, *(1 | nodes << 1 for nodes in seen_nodes(parents))])
    cached = list(range(num_cached))
    everything = cached + [num_cached + row for row in range(num_new)]
    got = attend(everything, list(range(num_new)), sees)
    for node, parent in enumerate(parents):
        way = [node + 1]
        while parent != ROOT:
            way.insert(0, parent + 1)
            parent = parents[parent]
        rows = [0, *way]
        want = attend(cached + [num_cached + row for row in rows], rows, None)
        torch.testing.assert_close(got[node + 1], want[-1])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [None, torch.int8], ids=["dense", "int8"])
@pytest.mark.parametrize("traits", [AttentionTraits(), TRAITS], ids=["plain", "cap and sinks"])
def test_every_implementation(
    name: str, dtype: torch.dtype | None, traits: AttentionTraits
) -> None:
    torch.manual_seed(2)
    random = torch.Generator().manual_seed(3)
    # Decodes that share pages, trees of all sizes, and a chunk that is none.
    extends = [2, 5, 64, 33, 90]
    batch = make_batch([(3, 2)], [1, 40], extends)
    batch = with_trees(batch, [draw_tree(random, size - 1) for size in extends if size <= 64])
    compare(name, batch, dtype, traits)


@given(st.lists(st.integers(2, 64), min_size=1, max_size=3), st.integers(0, 2**31), st.booleans())
@settings(max_examples=examples(100))
def test_any_tree(sizes: list[int], seed: int, is_native: bool) -> None:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    batch = make_batch([], [30], sizes)
    batch = with_trees(batch, [draw_tree(random, size - 1) for size in sizes])
    compare(IMPLEMENTATIONS[-1] if is_native else "torch", batch, None, AttentionTraits())


def compare(
    name: str, batch: AttentionBatch, dtype: torch.dtype | None, traits: AttentionTraits
) -> None:
    caches = filled(batch, dtype)
    q = torch.randn(sum(batch.query_lens), HEADS, HEAD_DIM)
    want = REFERENCE.paged_attention(q, *caches, batch, SCALE, traits)
    got = make_kernels(name).paged_attention(q, *caches, replace(batch, cache={}), SCALE, traits)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    chain = replace(batch, sees=None, cache={})
    plain = REFERENCE.paged_attention(q, *caches, chain, SCALE, traits)
    if any(size > 3 for size in batch.query_lens):
        assert not torch.allclose(plain, want), "the trees are no chains"


@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_tokens_move_all_at_once(dtype: torch.dtype | None) -> None:
    torch.manual_seed(4)
    cache = filled(make_batch([(1, 3)], [17], []), dtype)[0]

    def tokens() -> Tensor:
        """[tokens, heads, entries]"""
        pages = torch.arange(len(cache))
        wide = cache if dtype is None else dequantize_pages(cache, pages, HEAD_DIM, torch.float32)
        return wide.transpose(1, 2).flatten(0, 1).clone()

    before = tokens()
    move_tokens(cache, torch.tensor([17, 40, 3]), torch.tensor([3, 17, 63]))
    expected = before.clone()
    expected[[3, 17, 63]] = before[[17, 40, 3]]
    torch.testing.assert_close(tokens(), expected, rtol=0, atol=0)
