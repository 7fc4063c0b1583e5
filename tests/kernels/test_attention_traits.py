"""Sliding windows, soft caps, sinks and ALiBi: the reference against other libraries and the
definition, every implementation against the reference."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward as gpt_oss_attention,
)

from sapwood.base.errors import ConfigError
from sapwood.kernels.attention_batch import (
    ALIBI,
    SINKS,
    SLIDING_WINDOW,
    SOFT_CAP,
    AttentionBatch,
    AttentionTraits,
    lacking,
)
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.cpu.shared import groups_of_decodes
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import LARGEST_NUMBER, kv_cache_shape, write
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import IMPLEMENTATIONS as REGISTERED
from sapwood.kernels.registry import Need, select_kernels
from tests.kernels.conftest import IMPLEMENTATIONS, make_kernels
from tests.kernels.test_cpu_shared_attention import make_batch
from tests.tiers import examples, sweep

NUM_NEW, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 5, 12, 4, 2, 16
SCALE = 0.3
PAGE = 16
NEED = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "page_size": 16}
REFERENCE = ReferenceKernels()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
"""Of the largest entry: bf16 rounds probabilities, and torch's kernels scores too."""


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """New queries, all keys and values, of one request."""
    torch.manual_seed(0)
    q = torch.randn(NUM_NEW, HEADS, HEAD_DIM) * 3
    k, v = (torch.randn(KV_HEADS, LENGTH, HEAD_DIM) for _ in "kv")
    return q, k, v


def attend(kernels: Kernels, qkv: tuple[Tensor, Tensor, Tensor], traits: AttentionTraits) -> Tensor:
    q, k, v = qkv
    batch = AttentionBatch(
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        query_start=torch.tensor([0, NUM_NEW], dtype=torch.int32),
        context_len=torch.tensor([LENGTH], dtype=torch.int32),
        query_lens=(NUM_NEW,),
        context_lens=(LENGTH,),
        num_decodes=0,
    )
    return kernels.paged_attention(q, k[None], v[None], batch, SCALE, traits)


def mask_of(window: int) -> Tensor:
    query = torch.arange(LENGTH - NUM_NEW, LENGTH)[:, None]
    key = torch.arange(LENGTH)[None]
    seen = (key <= query) & (key > query - window)
    return torch.zeros(1, 1, NUM_NEW, LENGTH).masked_fill(~seen, -torch.inf)


class TestReference:
    @pytest.mark.parametrize("window", [1, 4, LENGTH])
    def test_soft_cap_and_window_as_in_gemma2(
        self, qkv: tuple[Tensor, Tensor, Tensor], window: int
    ) -> None:
        module = SimpleNamespace(num_key_value_groups=2, training=False, head_dim=HEAD_DIM)
        q, k, v = qkv
        want, _ = gemma2_attention(
            module, q.transpose(0, 1)[None], k[None], v[None], mask_of(window), scaling=SCALE,
            softcap=2.0,
        )  # fmt: skip
        got = attend(REFERENCE, qkv, AttentionTraits(window=window, soft_cap=2.0))
        torch.testing.assert_close(got, want[0])

    def test_sinks_and_window_as_in_gpt_oss(self, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        sinks = torch.tensor([-2.0, 0.0, 1.0, 5.0])
        module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
        q, k, v = qkv
        want, _ = gpt_oss_attention(
            module, q.transpose(0, 1)[None], k[None], v[None], mask_of(6), scaling=SCALE
        )
        got = attend(REFERENCE, qkv, AttentionTraits(window=6, sinks=sinks))
        torch.testing.assert_close(got, want[0])

    def test_alibi_as_in_bloom(self, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        """Bloom adds slope * position of the key, which differs by a constant per row."""
        q, k, v = qkv
        bias = build_alibi_tensor(torch.ones(1, LENGTH), HEADS, torch.float32)  # [heads, 1, keys]
        keys, values = (x.repeat_interleave(2, dim=0) for x in (k, v))
        scores = q.transpose(0, 1) @ keys.transpose(1, 2) * SCALE + bias + mask_of(LENGTH)[0]
        want = (scores.softmax(dim=-1) @ values).transpose(0, 1)
        slopes = bias[:, 0, 1] - bias[:, 0, 0]
        assert slopes.tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
        got = attend(REFERENCE, qkv, AttentionTraits(alibi=slopes))
        torch.testing.assert_close(got, want)


def traits_of(description: dict[str, float], num_heads: int) -> AttentionTraits:
    """window, soft_cap, sinks (their mean) and alibi (the largest slope)."""
    slopes = torch.logspace(0, -3, num_heads, base=2.0)
    return AttentionTraits(
        window=int(description["window"]) if "window" in description else None,
        soft_cap=description.get("soft_cap"),
        sinks=torch.randn(num_heads) + description["sinks"] if "sinks" in description else None,
        alibi=slopes * description["alibi"] if "alibi" in description else None,
    )


def check(
    kernels: Kernels,
    batch: AttentionBatch,
    traits: AttentionTraits,
    *,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    shows_what_was_given_away: bool = False,
) -> None:
    """Compare with the reference. Pages that nobody sees are NaN.

    shows_what_was_given_away  whether the entries of pages before a window stay as they are; else
                               they name a page of NaN or none that is there"""
    num_heads, num_kv_heads = heads
    num_pages = int(batch.page_table.max()) + 2  # the last one is nobody's
    shape = kv_cache_shape(num_pages, num_kv_heads, PAGE, head_dim, kv_dtype or dtype)
    caches = [torch.full(shape, 255, dtype=torch.uint8).view(kv_dtype) if kv_dtype
              else torch.full(shape, torch.nan, dtype=dtype) for _ in "kv"]  # fmt: skip
    table, seen = batch.page_table.clone(), set()
    for row, (num_new, length) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        first = max(0, length - num_new - (traits.window or length) + 1) // PAGE
        seen |= set(table[row, first : -(-length // PAGE)].tolist())
        if not shows_what_was_given_away:
            gone = torch.tensor([num_pages - 1, -1, 2**30], dtype=torch.int32)
            table[row, :first] = gone.repeat(first // 3 + 1)[:first]
    for page in seen:
        for cache in caches:
            entries = torch.randn(PAGE, num_kv_heads, head_dim)
            if kv_dtype:
                write(cache, page * PAGE + torch.arange(PAGE), entries)
            else:
                cache[page] = entries.transpose(0, 1).to(dtype)
    batch = replace(batch, page_table=table, host_page_table=table.numpy(), cache={})
    q = torch.randn(sum(batch.query_lens), num_heads, head_dim).to(dtype)
    want = REFERENCE.paged_attention(q, *caches, batch, head_dim**-0.5, traits).float()
    for _ in range(2):  # the next layer's call finds a plan
        found = kernels.paged_attention(q, *caches, batch, head_dim**-0.5, traits)
        assert found.dtype == dtype
        assert (found.float() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


TRAITS: list[dict[str, float]] = [
    {},
    {"window": 1},
    {"window": 20},
    {"window": 100},
    {"window": 230},
    {"window": 4000},
    {"soft_cap": 0.5},
    {"soft_cap": 30.0},
    {"sinks": 0.0},
    {"sinks": 40.0},
    {"sinks": -300.0},
    {"alibi": 0.5},
    {"window": 20, "sinks": 1.0},
    {"window": 100, "soft_cap": 5.0, "sinks": 1.0, "alibi": 0.1},
]


@sweep(
    name=IMPLEMENTATIONS,
    traits=TRAITS,
    dtype=[torch.float32, torch.bfloat16],
    kv_dtype=[None, *LARGEST_NUMBER],
    heads=[((9, 3), 64), ((4, 4), 32), ((16, 1), 96)],
    shows_what_was_given_away=[True, False],
)
def test_every_path(
    name: str,
    traits: dict[str, float],
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    heads: tuple[tuple[int, int], int],
    shows_what_was_given_away: bool,
) -> None:
    """Decodes that share pages, some alone, one with a long context; chunks and prompts."""
    torch.manual_seed(5)
    batch = make_batch([(13, 12), (2, 3), (1, 0)], [1, 16, 17, 90, 700], [5, 40, 150])
    assert groups_of_decodes(batch, PAGE, 1)
    check(
        make_kernels(name), batch, traits_of(traits, heads[0][0]), heads=heads[0],
        head_dim=heads[1], dtype=dtype, kv_dtype=kv_dtype,
        shows_what_was_given_away=shows_what_was_given_away,
    )  # fmt: skip


@given(
    groups=st.lists(st.tuples(st.integers(1, 15), st.integers(0, 14)), min_size=1, max_size=3),
    own=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    extends=st.lists(st.integers(2, 60), max_size=3),
    window=st.none() | st.integers(1, 300),
    soft_cap=st.none() | st.floats(0.25, 50),
    sinks=st.none() | st.floats(-5, 5),
    alibi=st.none() | st.floats(0.001, 1),
    kv_dtype=st.sampled_from([None, torch.int8]),
    name=st.sampled_from(["torch", "generic", ""]),
)
@settings(max_examples=examples(300))
def test_any_batch_and_traits(
    groups: list[tuple[int, int]],
    own: list[int],
    extends: list[int],
    window: int | None,
    soft_cap: float | None,
    sinks: float | None,
    alibi: float | None,
    kv_dtype: torch.dtype | None,
    name: str,
) -> None:
    torch.manual_seed(4)
    if name != "torch" and not CpuKernels.usable_isas():
        name = "torch"
    described = {"window": window, "soft_cap": soft_cap, "sinks": sinks, "alibi": alibi}
    traits = traits_of({key: x for key, x in described.items() if x is not None}, 6)
    batch = make_batch(groups, own, extends)
    check(make_kernels(name), batch, traits, heads=(6, 2), head_dim=32, kv_dtype=kv_dtype)


@pytest.mark.skipif(not CpuKernels.usable_isas(), reason="no native kernels")
class TestCpu:
    def test_work_is_bounded_by_the_window(self) -> None:
        """Ten thousand tokens with a window of 64 are as many tasks as a hundred and twenty."""
        kernels = CpuKernels(num_threads=2)
        shape = (4, 1, 32, PAGE, 1000)
        long, short = make_batch([(1, 600)], [20], []), make_batch([(1, 6)], [20], [])
        tasks = [kernels.plan(batch, shape, (64,)).num_tasks(64) for batch in (long, short)]
        assert tasks == [1, 1]
        assert kernels.plan(long, shape).num_tasks(0) > 1

    def test_one_plan_serves_layers_with_and_without_a_window(self) -> None:
        torch.manual_seed(6)
        kernels, batch = CpuKernels(num_threads=2), make_batch([(3, 4)], [5], [30])
        shape = kv_cache_shape(int(batch.page_table.max()) + 1, 2, PAGE, 32)
        keys, values = torch.randn(shape), torch.randn(shape)
        q = torch.randn(sum(batch.query_lens), 4, 32)
        for window in (None, 40, None, 7):
            traits = AttentionTraits(window=window)
            found = kernels.paged_attention(q, keys, values, batch, 0.2, traits)
            want = REFERENCE.paged_attention(q, keys, values, batch, 0.2, traits)
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        assert len(batch.cache["cpu_plans"]) == 1

    def test_a_page_within_the_window_that_is_not_there(self) -> None:
        batch = make_batch([(1, 3)], [4], [])
        batch.page_table[0, 2] = 99
        cache = torch.zeros(kv_cache_shape(5, 1, PAGE, 32))
        q, kernels = torch.zeros(1, 1, 32), CpuKernels()
        kernels.paged_attention(q, cache, cache, batch, 1.0, AttentionTraits(window=4))
        with pytest.raises(IndexError, match="request 0 of the batch names page 99"):
            kernels.paged_attention(q, cache, cache, batch, 1.0, AttentionTraits(window=5))

    def test_numbers_of_heads_are_checked(self) -> None:
        batch, cache = make_batch([(1, 1)], [4], []), torch.zeros(kv_cache_shape(3, 2, PAGE, 32))
        q = torch.zeros(1, 4, 32)
        for name, numbers in (("sinks", torch.zeros(3)), ("alibi", torch.zeros(4).double())):
            traits = AttentionTraits(**{name: numbers})
            with pytest.raises(ValueError, match=rf"{name} \[\d\] float\d\d must be \[4\] float32"):
                CpuKernels().paged_attention(q, cache, cache, batch, 1.0, traits)


@pytest.mark.parametrize("name", ["torch", "cpu", "reference"])
def test_kernels_have_all_of_them(name: str) -> None:
    need = Need(**NEED, attention=frozenset({SLIDING_WINDOW, SOFT_CAP, SINKS, ALIBI}))
    if name == "cpu" and not CpuKernels.usable_isas():
        pytest.skip("no native kernels")
    assert select_kernels(need, only=name).kernels.name == name


def test_kernels_without_a_feature_say_so() -> None:
    need = Need(**NEED, attention=frozenset({SLIDING_WINDOW, "blocks of chosen keys"}))
    table = {name: REGISTERED[name] for name in ("torch", "reference")}
    with pytest.raises(
        ConfigError, match=r"page size 16, blocks of chosen keys, sliding window"
    ) as e:
        select_kernels(need, table=table)
    assert "torch: its attention has no blocks of chosen keys;" in str(e.value)
    assert lacking(frozenset({SINKS, SOFT_CAP}), frozenset({SINKS})) == (
        "its attention has no logit soft cap"
    )


def test_features_and_limits() -> None:
    assert AttentionTraits().features == frozenset()
    assert AttentionTraits(window=3, sinks=torch.zeros(2)).features == {SLIDING_WINDOW, SINKS}
    assert AttentionTraits(alibi=torch.zeros(2)).features == {ALIBI}
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        AttentionTraits(window=0)
    with pytest.raises(ValueError, match="soft_cap must be positive, got -1"):
        AttentionTraits(soft_cap=-1.0)
