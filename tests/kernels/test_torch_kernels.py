"""TorchKernels against ReferenceKernels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.kv_cache import kv_cache_shape
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.kernels.torch_ops.attention import group_by_length
from tests.models.lm.harness import NewTokens, make_attention_batch

REFERENCE = ReferenceKernels()
TORCH = TorchKernels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HEADS = [(4, 4), (9, 3), (8, 2), (5, 1)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_rms_norm(rows: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, 96, dtype=dtype) * 3, randn(96, dtype=dtype)
    close(TORCH.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("rows", [1, 2])
def test_rms_norm_of_small_numbers_heeds_epsilon(rows: int) -> None:
    x, weight = randn(rows, 32, dtype=torch.float32) * 1e-3, torch.ones(32)
    close(TORCH.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_add_rms_norm(rows: int, dtype: torch.dtype) -> None:
    x, residual = randn(rows, 64, dtype=dtype), randn(rows, 64, dtype=dtype)
    weight = randn(64, dtype=dtype)
    want_normed, want_sum = REFERENCE.add_rms_norm(x, residual.clone(), weight, 1e-6)
    normed, total = TORCH.add_rms_norm(x, residual, weight, 1e-6)
    close(normed, want_normed)
    close(total, want_sum)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33])
def test_gated_activation_and_embedding(rows: int, dtype: torch.dtype) -> None:
    x = randn(rows, 48, dtype=dtype) * 4
    close(
        TORCH.activate_and_mul(x.clone(), Activation.SILU),
        REFERENCE.activate_and_mul(x, Activation.SILU),
    )
    table, ids = randn(19, 8, dtype=dtype), torch.randint(0, 19, (rows,))
    assert torch.equal(TORCH.embedding(ids, table), REFERENCE.embedding(ids, table))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "out_size", "in_size"), [(1, 96, 64), (7, 5, 33), (130, 40, 576)])
def test_linear(rows: int, out_size: int, in_size: int, bias: bool, dtype: torch.dtype) -> None:
    weight = randn(out_size, in_size, dtype=dtype) * in_size**-0.5
    bias_vector = randn(out_size, dtype=dtype) if bias else None
    x = randn(rows, in_size, dtype=dtype)
    want = REFERENCE.pack_linear(weight, bias_vector)(x)
    close(TORCH.pack_linear(weight, bias_vector)(x), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", ["neither", "both", "q", "k"])
@pytest.mark.parametrize("rotary_dim", [64, 32])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_qk_norm_rope_write_kv(
    num_heads: int, num_kv_heads: int, rotary_dim: int, norms: str, dtype: torch.dtype
) -> None:
    num_tokens, head_dim, page_size = 11, 64, 4
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    shape = kv_cache_shape(9, num_kv_heads, page_size, head_dim)
    caches = [[torch.zeros(shape, dtype=dtype) for _ in "kv"] for _ in range(2)]
    queries = []
    write_index = torch.randperm(9 * page_size)[:num_tokens]
    positions = torch.randint(0, 300, (num_tokens,))
    q_norm, k_norm, cos_sin = (randn(n, dtype=dtype) for n in (head_dim, head_dim, 300))
    cos_sin = torch.randn(300, rotary_dim)
    for kernels, (key_cache, value_cache) in zip((REFERENCE, TORCH), caches, strict=True):
        q = kernels.qk_norm_rope_write_kv(
            qkv.clone(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_norm=q_norm if norms in ("both", "q") else None,
            k_norm=k_norm if norms in ("both", "k") else None,
            eps=1e-6,
            cos_sin=cos_sin,
            positions=positions,
            key_cache=key_cache,
            value_cache=value_cache,
            write_index=write_index,
        )
        queries.append(q)
    close(queries[1], queries[0])
    close(caches[1][0], caches[0][0])
    assert torch.equal(caches[1][1], caches[0][1])


def check_attention(
    requests: Sequence[tuple[int, int]],
    *,
    num_decodes: int,
    heads: tuple[int, int],
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> AttentionBatch:
    """requests: (new tokens, context length) each. Whatever no token wrote is NaN."""
    num_heads, num_kv_heads = heads
    num_pages = [-(-length // page_size) for _, length in requests]
    free = (torch.randperm(sum(num_pages)) + 1).tolist()
    shape = kv_cache_shape(1 + sum(num_pages), num_kv_heads, page_size, head_dim)
    key_cache, value_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in "kv")
    new_tokens = []
    for (num_new, length), count in zip(requests, num_pages, strict=True):
        pages = [free.pop() for _ in range(count)]
        new_tokens.append(NewTokens([0] * num_new, length - num_new, pages))
        for number, page in enumerate(pages):
            written = min(page_size, length - number * page_size)
            for cache in (key_cache, value_cache):
                cache[page, :, :written] = randn(num_kv_heads, written, head_dim, dtype=dtype)
    q = randn(sum(num_new for num_new, _ in requests), num_heads, head_dim, dtype=dtype)
    batch = make_attention_batch(new_tokens, num_decodes=num_decodes)
    scale = head_dim**-0.5
    want = REFERENCE.paged_attention(q, key_cache, value_cache, batch, scale)
    # Twice, for the second call (the next layer's) finds a plan and used scratch in the cache.
    for _ in range(2):
        close(TORCH.paged_attention(q, key_cache, value_cache, batch, scale), want)
    return batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("requests", "num_decodes"),
    [
        pytest.param([(1, 1)], 1, id="first token"),
        pytest.param([(1, 77)], 1, id="one decode"),
        pytest.param([(1, 16), (1, 33), (1, 5)], 3, id="ragged decodes"),
        pytest.param([(1, 900)], 1, id="long decode"),
        pytest.param([(1, 300), (1, 290), (1, 300)], 3, id="many keys"),
        pytest.param([(40, 40)], 0, id="prompt"),
        pytest.param([(9, 60)], 0, id="prompt with a prefix"),
        pytest.param([(1, 20), (1, 8), (30, 30), (5, 21)], 2, id="mixed"),
        pytest.param([(3, 8), (1, 12)], 0, id="a last token that is no decode"),
    ],
)
def test_attention(
    requests: list[tuple[int, int]], num_decodes: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    check_attention(requests, num_decodes=num_decodes, heads=heads, dtype=dtype)


@pytest.mark.parametrize("page_size", [1, 2, 32, 128])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_attention_over_page_and_head_sizes(page_size: int, head_dim: int) -> None:
    check_attention(
        [(1, 65), (1, 1), (1, 128), (33, 40)],
        num_decodes=3,
        heads=(6, 3),
        head_dim=head_dim,
        page_size=page_size,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_goes_block_by_block(dtype: torch.dtype) -> None:
    check_attention([(300, 1500)], num_decodes=0, heads=(9, 3), dtype=dtype)


def test_decodes_of_very_different_length_are_split() -> None:
    lengths = [40, 2600, 55, 2400, 61]
    assert group_by_length(lengths) == [[1, 3], [4, 2, 0]]
    requests = [(1, length) for length in lengths]
    check_attention([*requests, (4, 20)], num_decodes=5, heads=(4, 2), page_size=32)


def test_groups_waste_little_and_hold_each_request_once() -> None:
    lengths = torch.randint(1, 8000, (64,)).tolist()
    groups = group_by_length(lengths)
    assert sorted(index for group in groups for index in group) == list(range(64))
    padded = sum(max(lengths[i] for i in group) * len(group) for group in groups)
    assert padded <= 2 * sum(lengths) + 2048
    assert group_by_length([7, 9, 8]) == [[0, 1, 2]]


def test_what_the_plan_needs_is_computed_once_per_step() -> None:
    batch = check_attention([(1, 30), (6, 6)], num_decodes=1, heads=(4, 2))
    assert len(batch.cache) == 1
