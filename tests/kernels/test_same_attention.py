"""A query's attention depends on its keys alone, bit by bit: not on how a prompt is cut in chunks,
who else is in the batch, whose pages are shared, how drafts stand in a tree, or the number of
threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch, AttentionTraits
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.cpu.shared import groups_of_decodes
from sapwood.kernels.kv_cache import kv_cache_shape, move_tokens, write
from sapwood.schema.draft_tree import ROOT, seen_nodes
from tests.tiers import examples

pytestmark = pytest.mark.skipif(not CpuKernels.usable_isas(), reason="no native kernels")

PAGE = 16
ISAS = CpuKernels.usable_isas()
TRAITS = {
    "plain": AttentionTraits(),
    "window": AttentionTraits(window=100),
    "short window": AttentionTraits(window=7),
    "all": AttentionTraits(window=300, soft_cap=5.0, sinks=torch.linspace(-1, 1, 16)),
}


@dataclass(frozen=True)
class Sizes:
    """Of a layer; a latent one has no values, but `rank` entries of a key are its value."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype | None = None
    rank: int = 0


@dataclass
class Case:
    """Sequences of `lengths` tokens, of which the first `num_shared` ones lie in the same pages."""

    sizes: Sizes
    lengths: Sequence[int]
    num_shared: int
    seed: int = 0
    rows: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        prefix = list(range(1, 1 + self.num_shared // PAGE))
        following = 1 + len(prefix)
        self.rows = []
        for length in self.lengths:
            own = -(-length // PAGE) + 2 - len(prefix)
            self.rows.append(prefix + list(range(following, following + own)))
            following += own
        size = self.sizes
        store = size.cache_dtype or size.dtype
        shape = kv_cache_shape(following, size.kv_heads, PAGE, size.head_dim, store)
        if size.cache_dtype is None:
            self.caches = [torch.randn(shape).to(size.dtype) for _ in "kv"]
        else:
            self.caches = [torch.zeros(shape, dtype=torch.uint8).view(store) for _ in "kv"]
            for cache in self.caches:
                tokens = torch.randn(following * PAGE, size.kv_heads, size.head_dim)
                write(cache, torch.arange(following * PAGE), tokens)
        self.queries = [
            torch.randn(length, size.heads, size.head_dim).to(size.dtype) for length in self.lengths
        ]

    def batch(self, spans: Sequence[tuple[int, int, int]]) -> AttentionBatch:
        """spans: (sequence, first new token, end), those of one token first."""
        table = np.zeros((len(spans), max(map(len, self.rows))), dtype=np.int32)
        for row, (sequence, _, _) in zip(table, spans, strict=True):
            row[: len(self.rows[sequence])] = self.rows[sequence]
        query_lens = [end - begin for _, begin, end in spans]
        return AttentionBatch(
            page_table=torch.from_numpy(table.copy()),
            query_start=torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32),
            context_len=torch.tensor([end for _, _, end in spans], dtype=torch.int32),
            query_lens=tuple(query_lens),
            context_lens=tuple(end for _, _, end in spans),
            num_decodes=sum(length == 1 for length in query_lens),
            host_page_table=table,
        )

    def attend(
        self, kernels: CpuKernels, batch: AttentionBatch, q: Tensor, traits: AttentionTraits
    ) -> Tensor:
        scale = self.sizes.head_dim**-0.5
        if self.sizes.rank:
            return kernels.latent_attention(q, self.caches[0], batch, scale, self.sizes.rank)
        return kernels.paged_attention(q, *self.caches, batch, scale, traits)

    def run(
        self,
        kernels: CpuKernels,
        spans: Sequence[tuple[int, int, int]],
        traits: AttentionTraits,
        shares: bool = True,
    ) -> list[Tensor]:
        """The results of each span."""
        batch = self.batch(spans)
        if not shares:
            batch = replace(batch, host_page_table=None)
        q = torch.cat([self.queries[sequence][begin:end] for sequence, begin, end in spans])
        return list(self.attend(kernels, batch, q, traits).split(batch.query_lens))

    def one_by_one(self, kernels: CpuKernels, sequence: int, traits: AttentionTraits) -> Tensor:
        """Each token as a decode."""
        steps = [[(sequence, t, t + 1)] for t in range(self.lengths[sequence])]
        return torch.cat([self.run(kernels, step, traits)[0] for step in steps])


def kernels_of(isa: str, num_threads: int) -> CpuKernels:
    return CpuKernels(isa=isa, num_threads=num_threads)


BF16, FP32 = torch.bfloat16, torch.float32
LAYERS = {
    "bf16": Sizes(9, 3, 64, BF16),
    "fp32": Sizes(4, 2, 32, FP32),
    "bf16 many heads": Sizes(16, 1, 96, BF16),
    "bf16 int8": Sizes(6, 2, 64, BF16, torch.int8),
    "fp32 fp8": Sizes(2, 2, 32, FP32, torch.float8_e4m3fn),
    "bf16 latent": Sizes(4, 1, 96, BF16, rank=64),
    "fp32 latent": Sizes(16, 1, 96, FP32, rank=64),
    "bf16 latent many heads": Sizes(80, 1, 96, BF16, rank=64),
    "bf16 latent int8": Sizes(20, 1, 96, BF16, torch.int8, rank=64),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("traits", TRAITS)
def test_chunks_of_any_size(isa: str, layer: str, traits: str) -> None:
    """A prompt of 600 tokens: one by one, in chunks, whole, by one thread and by two."""
    if LAYERS[layer].rank and traits != "plain":
        return
    trait = TRAITS[traits]
    if trait.sinks is not None:
        trait = replace(trait, sinks=trait.sinks[: LAYERS[layer].heads].contiguous())
    case = Case(LAYERS[layer], [600], 0)
    alone, two = kernels_of(isa, 1), kernels_of(isa, 2)
    want = case.run(alone, [(0, 0, 600)], trait)[0]
    for kernels, sizes in [(two, [600]), (alone, [33, 256, 1, 3, 307]), (two, [500, 70, 30])]:
        ends = np.cumsum(sizes).tolist()
        spans = zip([0, *ends], ends, strict=False)
        got = [case.run(kernels, [(0, begin, end)], trait)[0] for begin, end in spans]
        torch.testing.assert_close(torch.cat(got), want, rtol=0, atol=0)
    for token in (0, 1, 31, 63, 64, 65, 130, 255, 256, 257, 333, 511, 512, 599):
        for kernels in (alone, two):
            got = case.run(kernels, [(0, token, token + 1)], trait)
            torch.testing.assert_close(got[0][0], want[token], rtol=0, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", ["bf16", "fp32", "bf16 latent", "bf16 int8"])
@pytest.mark.parametrize("traits", ["plain", "window"])
def test_in_company(isa: str, layer: str, traits: str) -> None:
    """Decodes with the same system prompt, beside a chunk of a prompt: in all kinds of groups."""
    trait = TRAITS["plain" if LAYERS[layer].rank else traits]
    lengths = [421, 422, 430, 500, 513, 700, 440, 441, 448, 449, 610, 611, 490]
    for num_shared in (416, 256, 144):
        case = Case(LAYERS[layer], lengths, num_shared)
        spans = [(i, length - 1, length) for i, length in enumerate(case.lengths[:-1])]
        spans.append((12, 420, 490))
        batch = case.batch(spans)
        assert groups_of_decodes(batch, PAGE, LAYERS[layer].heads // LAYERS[layer].kv_heads)
        want = [case.run(kernels_of(isa, 1), [span], trait)[0] for span in spans]
        for num_threads in (1, 2, 3):
            got = case.run(kernels_of(isa, num_threads), spans, trait)
            apart = case.run(kernels_of(isa, num_threads), spans, trait, shares=False)
            for one, other, expected in zip(got, apart, want, strict=True):
                torch.testing.assert_close(one, expected, rtol=0, atol=0)
                torch.testing.assert_close(other, expected, rtol=0, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", ["bf16", "fp32", "bf16 latent", "bf16 int8"])
@pytest.mark.parametrize("num_cached", [3, 120, 254, 256, 300])
def test_a_draft_in_a_tree(isa: str, layer: str, num_cached: int) -> None:
    """Each node has the result that it would have if only the drafts that it follows were there."""
    parents = [ROOT, 0, ROOT, 1, 0, 2, 5, 3]
    num_new = 1 + len(parents)
    case = Case(LAYERS[layer], [num_cached + num_new], 0)
    sees = torch.tensor([-1, *(1 | nodes << 1 for nodes in seen_nodes(parents))])
    span = (0, num_cached, num_cached + num_new)
    q = case.queries[0][num_cached:]
    pristine = [cache.clone() for cache in case.caches]
    for num_threads in (1, 2):
        kernels = kernels_of(isa, num_threads)
        got = case.attend(kernels, replace(case.batch([span]), sees=sees), q, AttentionTraits())
        for node, parent in enumerate(parents):
            way = [node + 1]
            while parent != ROOT:
                way.insert(0, parent + 1)
                parent = parents[parent]
            rows = torch.tensor([0, *way])
            table = torch.tensor(case.rows[0])
            places = [
                table[(num_cached + at) // PAGE] * PAGE + (num_cached + at) % PAGE
                for at in (rows, torch.arange(len(rows)))
            ]
            for cache, before in zip(case.caches, pristine, strict=True):
                cache.copy_(before)
                move_tokens(cache, places[0], places[1])
            end = num_cached + len(rows)
            alone = case.attend(
                kernels, case.batch([(0, end - 1, end)]), q[node + 1 :][:1], AttentionTraits()
            )
            torch.testing.assert_close(got[node + 1], alone[0], rtol=0, atol=0)
        for cache, before in zip(case.caches, pristine, strict=True):
            cache.copy_(before)


@given(st.data())
@settings(max_examples=examples(40))
def test_any_schedule(data: st.DataObject) -> None:
    """Sequences that begin alike, a step at a time, each with as many new tokens as is drawn."""
    isa = data.draw(st.sampled_from(ISAS))
    sizes = LAYERS[data.draw(st.sampled_from(sorted(LAYERS)))]
    trait = (
        AttentionTraits(window=data.draw(st.sampled_from([None, 40, 260])))
        if not sizes.rank
        else AttentionTraits()
    )
    num_shared = data.draw(st.integers(0, 30)) * PAGE
    lengths = [
        num_shared + 1 + data.draw(st.integers(0, 200)) for _ in range(data.draw(st.integers(1, 6)))
    ]
    case = Case(sizes, lengths, num_shared)
    want = [case.run(kernels_of(isa, 1), [(i, 0, n)], trait)[0] for i, n in enumerate(lengths)]
    done = [data.draw(st.integers(0, n - 1)) for n in lengths]
    kernels = kernels_of(isa, data.draw(st.integers(1, 3)))
    for _ in range(4):
        spans = []
        for i, length in enumerate(lengths):
            new = min(length - done[i], data.draw(st.sampled_from([1, 1, 1, 2, 17, 130])))
            if new > 0:
                spans.append((i, done[i], done[i] + new))
                done[i] += new
        spans.sort(key=lambda span: span[2] - span[1] > 1)
        if not spans:
            break
        for (i, begin, end), got in zip(spans, case.run(kernels, spans, trait), strict=True):
            torch.testing.assert_close(got, want[i][begin:end], rtol=0, atol=0)
