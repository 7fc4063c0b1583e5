"""The attention kernels against kernels/reference: plain batches of every shape."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sapwood.kernels.attention_batch import AttentionTraits
from sapwood.schema.draft_tree import ROOT, TREE_TOKENS, seen_nodes
from tests.kernels.triton.attention_cases import ATTENTION, make_case
from tests.tiers import long_only, sweep

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (1, 15, 16, 64, 130)
WINDOW = AttentionTraits(window=20)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("group", [1, 3, 8, 17, *long_only(2, 4, 5, 7)])
def test_decode_of_any_group(group: int, device: torch.device) -> None:
    requests = [(1, length) for length in LENGTHS]
    make_case(requests, heads=(2 * group, 2), dtype=torch.float16, device=device).check()


@sweep(strength=1, head_dim=[16, 64, 80, 96, 128, 256], dtype=DTYPES)
def test_head_sizes_and_dtypes(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    requests = [(1, 1), (1, 70), (3, 3), (9, 40)]
    make_case(requests, heads=(3, 1), head_dim=head_dim, dtype=dtype, device=device).check()


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 128])
def test_page_sizes(page_size: int, device: torch.device) -> None:
    requests = [*((1, length) for length in LENGTHS), (2, 64), (64, 64), (20, 129)]
    make_case(
        requests, heads=(2, 1), page_size=page_size, dtype=torch.float16, device=device
    ).check()


@pytest.mark.parametrize("group", [1, 3, 8, *long_only(4, 5, 7)])
def test_extend_of_any_group(group: int, device: torch.device) -> None:
    """Requests without a prefix and with one, at tile boundaries and off them."""
    requests = [(1, 1), (16, 16), (2, 40), (33, 70), (1, 90)]
    make_case(requests, heads=(group, 1), dtype=torch.float16, device=device).check()


def test_more_requests_than_are_looked_up_at_once(device: torch.device) -> None:
    requests = [(2, 3 + i % 4) for i in range(131)]
    make_case(
        requests, heads=(1, 1), head_dim=16, page_size=4, dtype=torch.float16, device=device
    ).check()


@pytest.mark.parametrize("num_new", [1, 4])
def test_long_context_is_split(num_new: int, device: torch.device) -> None:
    """Several parts of keys per row, and rows that have fewer parts than others."""
    requests = [(num_new, 1100), (num_new, 128), (num_new, 129), (num_new, num_new)]
    make_case(requests, heads=(2, 1), head_dim=16, dtype=torch.float16, device=device).check()


@sweep(
    strength=1,
    traits=[
        {"window": 1},
        {"window": 20},
        {"window": 70},
        {"soft_cap": 0.5},
        {"sinks": 0.0},
        {"sinks": 300.0},
        {"sinks": -300.0},
        {"alibi": 0.5},
        {"window": 20, "soft_cap": 5.0, "sinks": 1.0, "alibi": 0.1},
    ],
    page_size=[16, 128],
)
def test_traits(traits: dict[str, float], page_size: int, device: torch.device) -> None:
    """300 is far above all scores: almost nothing is left, and it must not overflow."""
    given = AttentionTraits(
        window=int(traits["window"]) if "window" in traits else None,
        soft_cap=traits.get("soft_cap"),
        sinks=torch.randn(4).to(device) + traits["sinks"] if "sinks" in traits else None,
        alibi=torch.rand(4).to(device) * traits["alibi"] if "alibi" in traits else None,
    )
    requests = [(1, 1), (1, 300), (5, 5), (18, 90)]
    case = make_case(requests, heads=(4, 2), page_size=page_size, device=device)
    if traits.get("sinks") == 300.0:
        out = ATTENTION(case.q, case.key_cache, case.value_cache, case.batch, 1.0, given)
        assert out.abs().max() < 1e-20
    else:
        case.check(given)


def test_pages_before_the_window_are_not_read(device: torch.device) -> None:
    """A model of windows only gives them back, and whoever has them next may write anything."""
    case = make_case([(1, 100), (3, 90)], heads=(2, 1), page_size=8, device=device)
    want = case.check(WINDOW)
    first_pages = case.batch.page_table[:, :8].long().flatten()
    case.key_cache[first_pages] = torch.nan
    case.value_cache[first_pages] = torch.nan
    scale = case.q.shape[2] ** -0.5
    arguments = (case.key_cache, case.value_cache, case.batch, scale, WINDOW)
    assert torch.equal(ATTENTION(case.q, *arguments), want)


def test_lengths_on_the_device_decide(device: torch.device) -> None:
    """A captured graph is replayed with other lengths than it was captured with."""
    case = make_case([(1, 40), (1, 130), (6, 50)], heads=(2, 1), device=device)
    want = case.check()
    shorter = replace(case.batch, query_lens=(1, 1, 6), context_lens=(1, 1, 6), cache={})
    got = ATTENTION(case.q, case.key_cache, case.value_cache, shorter, case.q.shape[2] ** -0.5)
    assert torch.equal(got, want)


def test_wider_page_table_changes_only_roundings(device: torch.device) -> None:
    """A graph's page table has room for the longest context: there are more splits than keys."""
    case = make_case([(1, 40), (1, 130)], heads=(2, 1), device=device)
    wide = torch.zeros(2, 300, dtype=torch.int32, device=device)
    wide[:, : case.batch.page_table.shape[1]] = case.batch.page_table
    replace(case, batch=replace(case.batch, page_table=wide)).check()


def test_rows_without_a_request_are_zero(device: torch.device) -> None:
    """A bucket of a graph has rows to spare: requests of no token, also with sinks."""
    case = make_case([(1, 40), (1, 1)], heads=(2, 1), device=device)
    context_len = torch.tensor([40, 0], dtype=torch.int32, device=device)
    batch = replace(case.batch, context_len=context_len)
    for traits in (AttentionTraits(), AttentionTraits(sinks=torch.zeros(2, device=device))):
        out = ATTENTION(case.q, case.key_cache, case.value_cache, batch, 1.0, traits)
        assert out[0].abs().min() > 0
        assert out[1].abs().max() == 0


def test_layers_side_by_side_and_rows_apart(device: torch.device) -> None:
    """Pages of one layer lie between those of others; q is part of a wider tensor."""
    case = make_case([(1, 40), (5, 20)], heads=(2, 1), device=device)
    caches = []
    for cache in (case.key_cache, case.value_cache):
        layers = torch.full((cache.shape[0], 3, *cache.shape[1:]), torch.nan, device=device)
        layers[:, 1] = cache
        caches.append(layers[:, 1])
    qkv = torch.full((case.q.shape[0], 4, case.q.shape[2]), torch.nan, device=device)
    qkv[:, :2] = case.q
    replace(case, q=qkv[:, :2], key_cache=caches[0], value_cache=caches[1]).check()


@pytest.mark.parametrize("seed", [0, 1, 2, *long_only(*range(3, 24))])
def test_random_batches(seed: int, device: torch.device) -> None:
    choose = random.Random(seed)
    num_kv_heads, group = choose.choice([1, 2]), choose.choice([1, 2, 3, 5, 7])
    requests = [(1, choose.choice(LENGTHS)) for _ in range(choose.randint(0, 3))]
    for _ in range(choose.randint(0 if requests else 1, 2)):
        num_new = choose.choice([2, 5, 16, 33])
        requests.append((num_new, num_new + choose.choice([0, 3, 48, 100])))
    sinks = torch.randn(num_kv_heads * group).to(device)
    traits = AttentionTraits(
        window=choose.choice([None, None, 1, 33]),
        soft_cap=choose.choice([None, 3.0]),
        sinks=choose.choice([None, sinks]),
    )
    make_case(
        requests,
        heads=(num_kv_heads * group, num_kv_heads),
        head_dim=choose.choice([64, 80, 128]),
        page_size=choose.choice([1, 16, 64]),
        dtype=DTYPES[seed % 3],
        device=device,
    ).check(traits)


class TestRefusals:
    def test_shapes_and_dtypes(self, device: torch.device) -> None:
        case = make_case([(1, 4)], heads=(4, 2), device=device)
        q, cache, batch = case.q, case.key_cache, case.batch
        with pytest.raises(ValueError, match=r"must be \[pages, 2, 16, 32\]"):
            ATTENTION(q[..., :32], cache, cache, batch, 1.0)
        with pytest.raises(TypeError, match=r"q is torch\.float16 and key_cache torch\.float32"):
            ATTENTION(q.half(), cache, cache, batch, 1.0)
        with pytest.raises(ValueError, match="3 query heads must be a multiple of 2"):
            ATTENTION(q[:, :3], cache, cache, batch, 1.0)
        turned = cache.transpose(2, 3).contiguous().transpose(2, 3)
        with pytest.raises(ValueError, match="lie together"):
            ATTENTION(q, turned, cache, batch, 1.0)
        traits = AttentionTraits(sinks=torch.zeros(3, device=device))
        with pytest.raises(ValueError, match=r"sinks \[3\] torch.float32 must be \[4\] float32"):
            ATTENTION(q, cache, cache, batch, 1.0, traits)
        traits = AttentionTraits(alibi=torch.zeros(4, device=device).double())
        with pytest.raises(ValueError, match=r"alibi \[4\] torch.float64 must be \[4\] float32"):
            ATTENTION(q, cache, cache, batch, 1.0, traits)

    def test_large_heads_and_groups(self, device: torch.device) -> None:
        large = make_case([(1, 1)], heads=(1, 1), head_dim=264, device=device)
        with pytest.raises(ValueError, match="head size 264 is more than 256"):
            large.check()
        many = make_case([(1, 1)], heads=(129, 1), head_dim=16, device=device)
        with pytest.raises(ValueError, match="at most 128 times as many"):
            many.check()


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_new_tokens_may_be_trees(device: torch.device, kv_dtype: torch.dtype | None) -> None:
    """Beside decodes, and a chunk that is no tree; some trees lie in several tiles."""
    torch.manual_seed(8)
    requests = [(1, 9), (2, 30), (7, 300), (64, 90), (70, 75)]
    case = make_case(requests, heads=(4, 2), device=device, kv_dtype=kv_dtype)
    sees: list[int] = []
    for num_new, _ in requests:
        if num_new == 1 or num_new > TREE_TOKENS:
            sees += [-1] * num_new
            continue
        parents = [int(torch.randint(ROOT, node, (1,))) for node in range(num_new - 1)]
        sees += [-1, *(1 | nodes << 1 for nodes in seen_nodes(parents))]
    as_int64 = [one - (1 << 64) if one >= 1 << 63 else one for one in sees]
    batch = replace(case.batch, sees=torch.tensor(as_int64, device=device))
    found = replace(case, batch=batch).check()
    plain = case.check()
    assert torch.equal(found[:2], plain[:2])
    assert not torch.allclose(found[3:10], plain[3:10], atol=1e-3)
