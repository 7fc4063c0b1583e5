"""Attention to shared pages, computed once: against kernels/reference, which knows no sharing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.kernels.attention_batch import AttentionBatch, AttentionTraits
from sapwood.kernels.triton import attention_shared_tiles
from sapwood.kernels.triton.attention_shared_tiles import (
    CapturedTiles,
    shared_groups,
)
from tests.kernels.triton.attention_cases import ATTENTION, Case, make_case
from tests.tiers import sweep

DECODES = [(1, 300), (1, 290), (1, 257), (1, 20), (1, 400)]
PREFIXES = [((0, 1, 2), 16), ((3, 4), 1)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_shared_tiles, "_WORTH_SHARING", 1)


def shares(case: Case) -> bool:
    """Whether the last call attended to shared pages apart."""
    return any(key.startswith("triton shared") and tiles for key, tiles in case.batch.cache.items())


@pytest.mark.usefixtures("_always_worth_it")
@sweep(
    strength=1,
    shape=[((4, 2), 64), ((7, 1), 80), ((3, 3), 128)],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_decodes(
    shape: tuple[tuple[int, int], int], dtype: torch.dtype, device: torch.device
) -> None:
    heads, head_dim = shape
    case = make_case(
        DECODES, heads=heads, head_dim=head_dim, dtype=dtype, prefixes=PREFIXES, device=device
    )
    case.check()
    assert shares(case)


@pytest.mark.usefixtures("_always_worth_it")
@pytest.mark.parametrize(("page_size", "longest"), [(1, 4), (64, 4), (16, 40)])
def test_with_extends(page_size: int, longest: int, device: torch.device) -> None:
    """Extends share too, but none does if one has many new tokens."""
    requests = [(1, 200), (1, 150), (5, 150), (longest, 180)]
    prefixes = [((0, 1, 2, 3), 128 // page_size)]
    case = make_case(
        requests, heads=(4, 1), page_size=page_size, prefixes=prefixes, device=device,
        dtype=torch.float16,
    )  # fmt: skip
    case.check()
    assert shares(case)
    (group,) = shared_groups(case.batch, page_size, tokens_per_tile=32)
    assert group.requests == ((0, 1, 2, 3) if longest == 4 else (0, 1))


@pytest.mark.usefixtures("_always_worth_it")
@pytest.mark.parametrize("window", [None, 10, 100, 200])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_traits(window: int | None, has_alibi: bool, device: torch.device) -> None:
    """Windows begin after the shared pages, within them and before them."""
    sinks = torch.randn(4).to(device)
    alibi = torch.tensor([0.5, 0.1, 0.02, 0.01], device=device) if has_alibi else None
    traits = AttentionTraits(window=window, soft_cap=4.0, sinks=sinks, alibi=alibi)
    requests = [(1, 170), (1, 260), (4, 190)]
    case = make_case(requests, heads=(4, 2), prefixes=[((0, 1, 2), 10)], device=device)
    case.check(traits)
    assert shares(case)


def test_long_shared_pages_are_split(device: torch.device) -> None:
    """34 requests: more tokens than a tile has, and enough saved to be worth it."""
    requests = [(1, 1030 + i) for i in range(34)]
    case = make_case(
        requests, heads=(4, 1), head_dim=16, page_size=64, prefixes=[(range(34), 16)],
        device=device, dtype=torch.float16,
    )  # fmt: skip
    case.check()
    assert shares(case)


def test_what_saves_little_is_not_shared(device: torch.device) -> None:
    case = make_case(DECODES, heads=(2, 1), prefixes=PREFIXES, device=device)
    case.check()
    assert not shares(case)


@pytest.mark.usefixtures("_always_worth_it")
def test_page_table_on_the_device_is_not_looked_at(device: torch.device) -> None:
    case = make_case(DECODES, heads=(2, 1), prefixes=PREFIXES, shows_pages=False, device=device)
    case.check()
    assert not shares(case)


def test_pages_of_new_tokens_are_not_shared(device: torch.device) -> None:
    """32 tokens are 2 pages, but the newest is in the second."""
    case = make_case([(1, 32), (1, 33)], heads=(1, 1), prefixes=[((0, 1), 2)], device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_shared_tiles, "_WORTH_SHARING", 1)
        (group,) = shared_groups(case.batch, 16, tokens_per_tile=16)
    assert group.num_pages == 1


@pytest.mark.usefixtures("_always_worth_it")
def test_a_captured_step_follows_the_plan_of_each_replay(device: torch.device) -> None:
    """Seven requests were captured; five, then two of them, then others share pages."""
    sharing = CapturedTiles(7, 16, device)
    warm = make_case([(1, 1)] * 7, heads=(4, 2), shows_pages=False, device=device)
    sharing.install(warm.batch)
    warm.check()
    for prefixes in (PREFIXES, [((1, 4), 3)], [((0, 4), 9), ((1, 2), 8)]):
        case = make_case(DECODES, heads=(4, 2), prefixes=prefixes, device=device)
        assert sharing.plan(case.batch)
        # What is captured sees tensors of seven requests; the last two are nobody's.
        table = torch.zeros(7, case.batch.page_table.shape[1], dtype=torch.int32, device=device)
        table[:5] = case.batch.page_table
        context_len = torch.ones(7, dtype=torch.int32, device=device)
        context_len[:5] = case.batch.context_len
        for cache in (case.key_cache, case.value_cache):
            cache[0] = 0.0
        captured = AttentionBatch(
            page_table=table,
            query_start=torch.arange(8, dtype=torch.int32, device=device),
            context_len=context_len,
            query_lens=(1,) * 7,
            context_lens=(table.shape[1] * 16,) * 7,
            num_decodes=7,
        )
        sharing.install(captured)
        q = torch.cat((case.q, torch.zeros_like(case.q[:2])))
        replace(case, q=q, batch=captured).check_rows(5, case)
        if prefixes is PREFIXES:
            # That pages are read from a group's first request shows that they are read once.
            table[1:3, :16] = 0
            replace(case, q=q, batch=captured).check_rows(5, case)


@pytest.mark.usefixtures("_always_worth_it")
def test_groups_that_do_not_fit_in_a_captured_step_are_left_out(device: torch.device) -> None:
    """Those that save the most come first."""
    prefixes = [((2 * i, 2 * i + 1), 2 + i) for i in range(6)]
    requests = [(1, 16 * 9)] * 12
    case = make_case(requests, heads=(1, 1), prefixes=prefixes, device=device)
    sharing = CapturedTiles(12, 16, device)
    tiles = sharing.tiles(16)
    assert sharing.plan(case.batch)
    assert (
        tiles.shared_len.tolist()
        == [0] * 4 + [4 * 16] * 2 + [5 * 16] * 2 + [6 * 16] * 2 + [7 * 16] * 2
    )
    assert (tiles.requests[:, 0] >= 0).all()


def test_nothing_is_planned_where_nothing_is_worth_sharing(device: torch.device) -> None:
    sharing = CapturedTiles(5, 16, device)
    sharing.tiles(32)
    case = make_case(DECODES, heads=(4, 2), prefixes=PREFIXES, device=device)
    assert not sharing.plan(case.batch)
    hidden = make_case(DECODES, heads=(4, 2), prefixes=PREFIXES, shows_pages=False, device=device)
    assert not sharing.plan(hidden.batch)


def test_shared_pages_are_read_from_one_request(device: torch.device) -> None:
    """It is not only a result that is right: other members' entries of the table are not used."""
    case = make_case(DECODES, heads=(4, 2), prefixes=PREFIXES, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_shared_tiles, "_WORTH_SHARING", 1)
        want = case.check()
        broken = case.batch.page_table.clone()
        broken[1:3, :16] = 0  # nobody's page, NaN
        batch = replace(case.batch, page_table=broken)
        arguments = (case.key_cache, case.value_cache, batch, case.q.shape[2] ** -0.5)
        assert torch.equal(ATTENTION(case.q, *arguments), want)
