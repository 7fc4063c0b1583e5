"""Cache groups, the pools that they share, and how memory is shared out over these."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.schema.cache import (
    ACTIVATIONS,
    CacheGroup,
    CacheKind,
    CachePlan,
    CachePool,
    CacheTensor,
    Demand,
    keys_and_values,
    pages_of_window,
    pools_of,
    within,
)

FULL = keys_and_values([0, 2], num_kv_heads=2, head_dim=64, dtype="bfloat16")
WINDOW = keys_and_values([1, 3], num_kv_heads=2, head_dim=64, window=100, dtype="bfloat16")
STATE = CacheGroup(
    kind=CacheKind.STATE,
    layers=(4,),
    tensors={"conv": CacheTensor((3, 8), ACTIVATIONS), "state": CacheTensor((4, 4), "float32")},
)
DEMAND = Demand(num_requests=8, step_tokens=64)


def plan(*groups: CacheGroup, demand: Demand = DEMAND) -> CachePlan:
    definite = tuple(group.with_dtypes(kv="bfloat16", activations="bfloat16") for group in groups)
    return CachePlan(groups=definite, page_size=16, demand=demand)


def test_bytes_of_a_token_and_of_a_slot() -> None:
    assert FULL.unit_bytes == 2 * 2 * (2 * 64) * 2
    eight = keys_and_values([0], num_kv_heads=2, head_dim=64, dtype="int8")
    assert eight.unit_bytes == 2 * 2 * (64 + 2), "a scale for each vector"
    assert plan(STATE).groups[0].unit_bytes == 3 * 8 * 2 + 4 * 4 * 4


def test_ranks_share_units_and_have_the_last_one_of_a_kind_together() -> None:
    shape = CacheTensor((8 * 4 + 2 * 6, 3), units=((8, 4), (2, 6)))
    assert shape.of_rank(2).shape == (4 * 4 + 6, 3)
    assert shape.of_rank(4).shape == (2 * 4 + 6, 3)
    assert shape.of_rank(2).of_rank(2) == shape.of_rank(4)
    assert CacheTensor((2, 5)).of_rank(4).shape == (1, 5)
    assert CacheTensor((2, 5), split=None).of_rank(4).shape == (2, 5)


def test_with_dtypes_leaves_definite_ones_alone() -> None:
    group = STATE.with_dtypes(kv="int8", activations="float16")
    assert [tensor.dtype for tensor in group.tensors.values()] == ["float16", "float32"]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": CacheKind.FULL, "layers": ()},
        {"kind": CacheKind.FULL, "tensors": {}},
        {"kind": CacheKind.FULL, "window": 4},
        {"kind": CacheKind.WINDOW},
        {"kind": CacheKind.WINDOW, "window": 0},
    ],
)
def test_a_group_that_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    whole = {"layers": (0,), "tensors": {"k": CacheTensor((1, 2))}} | fields
    with pytest.raises(ValueError, match=r"a cache group|window must be"):
        CacheGroup(**whole)


def test_groups_that_keep_the_same_tokens_share_a_pool() -> None:
    latent = CacheGroup(
        kind=CacheKind.LATENT, layers=(5,), tensors={"latent": CacheTensor((1, 576))}
    )
    longer = keys_and_values([6], num_kv_heads=1, head_dim=8, window=200)
    assert pools_of([longer, STATE, FULL, WINDOW, latent]) == (
        CachePool(CacheKind.FULL, (2, 4)),
        CachePool(CacheKind.WINDOW, (3,), 100),
        CachePool(CacheKind.WINDOW, (0,), 200),
        CachePool(CacheKind.STATE, (1,)),
    )


def test_a_window_that_holds_the_whole_context_is_no_window() -> None:
    (merged,) = within([FULL, WINDOW], 100)
    assert (merged.kind, merged.layers) == (CacheKind.FULL, (0, 1, 2, 3))
    assert within([FULL, WINDOW], 101) == (FULL, WINDOW)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(0, 500))
def test_a_step_never_touches_more_pages_of_a_window(
    window: int, num_new: int, page_size: int, start: int
) -> None:
    first, last = max(start - window + 1, 0), start + num_new - 1
    touched = last // page_size - first // page_size + 1
    assert touched <= pages_of_window(window, num_new, page_size)


def test_a_window_pool_holds_what_running_requests_use_and_the_rest_is_for_the_others() -> None:
    windows = 8 * (pages_of_window(100, 1, 16) + 1) + 64 // 16
    assert plan(FULL, WINDOW).sizes(100_000) == (6250, windows)
    assert plan(FULL, WINDOW).sizes(320) == (20, 20), "no more than there is context"
    assert plan(FULL, STATE).sizes(320) == (20, 16)


def test_states_for_prefixes_are_as_many_as_there_are_places_and_no_larger_than_the_pages() -> None:
    whole = plan(FULL, STATE)
    assert whole.sizes(256 * 1000) == (16 * 1000, 8 + 1000), "one every 256 tokens"
    wide = CacheGroup(
        kind=CacheKind.STATE, layers=(4,), tensors={"state": CacheTensor((512, 1024), "float32")}
    )
    costly = plan(FULL, wide)
    assert costly.sizes(256 * 1000) == (16 * 1000, 8 + 256 * 1000 * FULL.unit_bytes // 2**21)
    assert costly.sizes(1024) == (64, 16), "one for each running request at least"
    assert replace(whole, num_states=3).sizes(256 * 1000) == (16 * 1000, 3)
    assert replace(whole, state_interval=512).sizes(256 * 1000) == (16 * 1000, 8 + 500)


def test_what_each_pool_has_is_said() -> None:
    assert plan(FULL, WINDOW, STATE).explained(1600) == (
        "all 1600 tokens in 2 layers, 1.6 MiB; 1216 tokens for windows of 100 in 2 layers, 1.2 "
        "MiB: all that running requests need; 16 states in 1 layer, 0.0 MiB: 8 for running "
        "requests, and 8 for prefixes, every 256 tokens and at the end of each prompt"
    )


@pytest.mark.parametrize(
    ("share", "pages", "why"),
    [
        (1.0, 100, "as many as there is context"),
        (0.501, 51, "0.501 of all tokens, by --swa-full-tokens-ratio"),
        (0.05, 13, "what one request needs, which is more than --swa-full-tokens-ratio asks for"),
    ],
)
def test_a_share_for_windows(share: float, pages: int, why: str) -> None:
    """13: 8 for the window of one request, one for a lock, and 4 for a step's 64 new tokens."""
    shared = replace(plan(FULL, WINDOW), window_share=share)
    assert shared.sizes(1600) == (100, pages)
    assert f"{pages * 16} tokens for windows of 100 in 2 layers, " in shared.explained(1600)
    assert shared.explained(1600).endswith(f"MiB: {why}")
    assert shared.num_bytes(1600) == (100 + pages) * 16 * FULL.unit_bytes


@given(
    st.integers(0, 10**8),
    st.sampled_from([(FULL,), (FULL, WINDOW), (FULL, STATE), (WINDOW,)]),
    st.sampled_from([None, 0.1, 0.8, 1.0]),
)
def test_as_many_tokens_as_fit(
    num_bytes: int, groups: tuple[CacheGroup, ...], share: float | None
) -> None:
    enough = 3200
    whole = replace(plan(*groups), window_share=share)
    tokens = whole.most_tokens(num_bytes, enough=enough)
    assert tokens % 16 == 0
    assert whole.num_bytes(tokens) <= num_bytes or tokens == 0
    is_limited = groups == (WINDOW,) and tokens == enough
    assert is_limited or whole.num_bytes(tokens + 16) > num_bytes


def test_stages_have_pools_of_the_same_sizes_and_the_bytes_of_their_layers() -> None:
    whole = plan(FULL, WINDOW, STATE)
    first, last = (replace(whole, held=frozenset(held)) for held in ((0, 1), (2, 3, 4)))
    assert first.pools == last.pools == whole.pools
    assert first.sizes(1600) == last.sizes(1600) == whole.sizes(1600)
    assert first.num_bytes(1600) + last.num_bytes(1600) == whole.num_bytes(1600)
    assert first.unit_bytes(first.pools[-1]) == 0, "its layers keep no states"
    assert "states in 1 layer" in last.explained(1600)
    budget = whole.num_bytes(1600)
    assert first.most_tokens(budget, enough=1 << 20) > whole.most_tokens(budget, enough=1 << 20)
    no_pages = replace(whole, held=frozenset([4]))
    assert no_pages.most_tokens(budget, enough=320) == 320
