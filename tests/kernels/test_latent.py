"""Latent attention's sizes, and its ops against the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import kv_cache_shape
from sapwood.kernels.latent import LatentSizes
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.kernels.torch_ops.latent import read_rows
from tests.models.lm.harness import NewTokens, make_attention_batch
from tests.tiers import sweep

DEEPSEEK_V3 = LatentSizes(
    num_heads=128, rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=1536
)


def test_sizes() -> None:
    assert (DEEPSEEK_V3.row, DEEPSEEK_V3.key_dim, DEEPSEEK_V3.made) == (576, 192, 256)
    # Of the published model's layers: 7168 -> 1536 and 576, 1536 -> 128 * 192, and so on.
    assert DEEPSEEK_V3.num_parameters(7168) == 187_105_280
    with pytest.raises(ValueError, match="must be >= 1"):
        LatentSizes(num_heads=1, rank=8, rope_dim=0, nope_dim=8, value_dim=8)
    with pytest.raises(ValueError, match="even"):
        LatentSizes(num_heads=1, rank=7, rope_dim=4, nope_dim=8, value_dim=8)


@pytest.mark.parametrize(
    ("num_new", "num_keys", "expands"),
    [
        (1, 1, False),
        (1, 8000, False),
        (8, 8000, False),
        (64, 64, True),
        (64, 8000, False),
        (1024, 1024, True),
        (1024, 8000, True),
        (8000, 8000, True),
    ],
)
def test_which_form_costs_less(num_new: int, num_keys: int, expands: bool) -> None:
    assert DEEPSEEK_V3.expands(num_new, num_keys) is expands


REFERENCE = ReferenceKernels()
KERNELS: dict[str, Kernels] = {"torch": TorchKernels()}
if CpuKernels.compiled_isas():
    KERNELS |= {f"cpu:{isa}": CpuKernels(isa=isa) for isa in CpuKernels.usable_isas()}
PAGE = 16
REQUESTS = [
    NewTokens([0], 299, tuple(range(19, 0, -1))),
    NewTokens([0], 4, (20,)),
    NewTokens([0] * 9, 13, (22, 21)),
    NewTokens([0] * 40, 0, (23, 25, 24)),
]
NUM_TOKENS, NUM_DECODES = 51, 2


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled_cache(row: int, rank: int, dtype: torch.dtype, kind: torch.dtype) -> Tensor:
    """Rows of all pages, in a pool with another layer, as the reference writes them."""
    shape = kv_cache_shape(26, 1, PAGE, row, kind)
    cache = torch.zeros(26, 2, *shape[1:], dtype=torch.uint8 if kind.itemsize == 1 else kind)
    own = cache.view(kind)[:, 1]
    num = 26 * PAGE
    REFERENCE.norm_rope_write_latent(
        drawn(num, 1, row, dtype=dtype),
        drawn(num, row, dtype=dtype, seed=1),
        norm=torch.ones(rank, dtype=dtype),
        eps=1e-6,
        cos_sin=torch.tensor([[1.0, 0.0]]),
        positions=torch.zeros(num, dtype=torch.int64),
        cache=own,
        write_index=torch.arange(num),
    )
    return own


def closeness(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}


@sweep(
    strength=1,
    kernels=[*KERNELS],
    heads=[2, 7, 16, 21, 40, 128],
    sizes=[(576, 512), (288, 256), (64, 32)],
    kind=["dense", "int8", "float8_e4m3fn"],
    dtype=[torch.float32, torch.bfloat16],
)
def test_attention_to_latent_rows(
    kernels: str, heads: int, sizes: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    """Decodes of different length, a chunk with a past, and a new prompt, in one step."""
    row, rank = sizes
    stored = dtype if kind == "dense" else getattr(torch, kind)
    cache = filled_cache(row, rank, dtype, stored)
    batch = make_attention_batch(REQUESTS, num_decodes=NUM_DECODES)
    q, scale = drawn(NUM_TOKENS, heads, row, dtype=dtype, seed=2), row**-0.5
    got = KERNELS[kernels].latent_attention(q, cache, batch, scale, rank)
    batch.cache.clear()
    expected = REFERENCE.latent_attention(q.clone(), cache, batch, scale, rank)
    assert got.shape == (NUM_TOKENS, heads, rank)
    torch.testing.assert_close(got, expected, **closeness(dtype))


@sweep(
    strength=1,
    kernels=[*KERNELS],
    sizes=[(512, 64, 64), (256, 32, 16), (32, 32, 0), (0, 64, 32), (24, 8, 8)],
    kind=["dense", "int8", "float8_e4m3fn"],
    dtype=[torch.float32, torch.bfloat16],
)
def test_rows_are_written(
    kernels: str, sizes: tuple[int, int, int], kind: str, dtype: torch.dtype
) -> None:
    """The last size is one that the compiled kernels leave to torch."""
    (rank, rope_dim, rotary_dim), nope_dim, num_tokens = sizes, 24, 9
    row, stored = rank + rope_dim, dtype if kind == "dense" else getattr(torch, kind)
    q = drawn(num_tokens, 3, nope_dim + rope_dim, dtype=dtype)
    wider = drawn(num_tokens, row + 6, dtype=dtype, seed=1)
    results = []
    for one in (KERNELS[kernels], REFERENCE):
        cache = torch.zeros(kv_cache_shape(3, 1, PAGE, row, stored), dtype=stored)
        rotated = q.clone()
        one.norm_rope_write_latent(
            rotated,
            wider[:, :row],
            norm=drawn(rank, dtype=dtype, seed=2),
            eps=1e-6,
            cos_sin=drawn(40, rotary_dim, dtype=torch.float32, seed=3),
            positions=torch.arange(30, 30 + num_tokens),
            cache=cache,
            write_index=torch.arange(num_tokens).flip(0) * 5,
        )
        assert torch.equal(rotated[..., :nope_dim], q[..., :nope_dim])
        results.append((rotated, read_rows(cache, torch.arange(3), row, torch.float32)))
    (got_q, got), (want_q, want) = results
    torch.testing.assert_close(got_q, want_q, **closeness(dtype))
    written = want.any(dim=1)
    assert written.sum() == num_tokens
    # In 8 bits a number may be rounded to its other neighbour.
    near = {"dense": closeness(dtype)["atol"], "int8": 0.06, "float8_e4m3fn": 0.3}[kind]
    torch.testing.assert_close(got, want, atol=near, rtol=0.13 if kind[0] == "f" else 0.02)


@sweep(
    strength=1,
    kernels=[*KERNELS],
    tokens=[1, 5, 40],
    sizes=[(3, 512, 128), (16, 24, 32), (128, 40, 6)],
    kept=[0, 8],
    dtype=[torch.float32, torch.bfloat16],
)
def test_a_linear_layer_of_each_head(
    kernels: str, tokens: int, sizes: tuple[int, int, int], kept: int, dtype: torch.dtype
) -> None:
    """Inputs and results are parts of the entries of longer heads; what is kept follows."""
    heads, num_out, num_in = sizes
    weight = drawn(heads, num_out, num_in, dtype=dtype, seed=3)
    x = drawn(tokens, heads, num_in + kept + 8, dtype=dtype, seed=4)[..., : num_in + kept]
    results = []
    for one in (KERNELS[kernels], REFERENCE):
        out = torch.zeros(tokens, heads, num_out + kept + 4, dtype=dtype)
        one.pack_heads(weight)(x, out[..., : num_out + kept])
        assert torch.equal(out[..., num_out : num_out + kept], x[..., num_in:])
        assert not out[..., num_out + kept :].any()
        results.append(out)
    at_most = 1e-3 if dtype == torch.float32 else 0.5
    torch.testing.assert_close(*results, atol=at_most, rtol=0.02)


@sweep(
    strength=1,
    kernels=[*KERNELS],
    sizes=[(12, 64, 5, 96, 64), (70, 128, 16, 576, 512), (12, 48, 3, 80, 48)],
    num_chosen=[1, 7, 64],
    kind=["dense", "int8", "float8_e4m3fn"],
    dtype=[torch.float32, torch.bfloat16],
)
def test_chosen_keys(
    kernels: str,
    sizes: tuple[int, int, int, int, int],
    num_chosen: int,
    kind: str,
    dtype: torch.dtype,
) -> None:
    """The same keys, ascending, and attention to these alone; with all keys, that of any rows. The
    last sizes are some that the compiled kernels leave to torch."""
    index_heads, index_dim, heads, row, rank = sizes
    stored, one = dtype if kind == "dense" else getattr(torch, kind), KERNELS[kernels]
    batch = make_attention_batch(REQUESTS, num_decodes=NUM_DECODES)
    index = filled_cache(index_dim, index_dim - 16, dtype, stored)
    cache = filled_cache(row, rank, dtype, stored)
    q = drawn(NUM_TOKENS, index_heads, index_dim, dtype=dtype, seed=5)
    weights = drawn(NUM_TOKENS, index_heads, dtype=torch.float32, seed=6)
    rows, scale = drawn(NUM_TOKENS, heads, row, dtype=dtype, seed=7), row**-0.5
    expected = REFERENCE.choose_keys(q, weights, index, batch, num_chosen)
    assert torch.equal(one.choose_keys(q, weights, index, batch, num_chosen), expected)
    got = one.sparse_latent_attention(rows, cache, batch, scale, rank, expected)
    wanted = REFERENCE.sparse_latent_attention(rows, cache, batch, scale, rank, expected)
    torch.testing.assert_close(got, wanted, **closeness(dtype))
    dense = REFERENCE.latent_attention(rows, cache, batch, scale, rank)
    is_whole = (expected >= 0).sum(dim=1) < num_chosen
    torch.testing.assert_close(got[is_whole], dense[is_whole], **closeness(dtype))
    assert is_whole.any() == (num_chosen > 1)
    assert not torch.allclose(got[0], dense[0], atol=0.05)


NATIVE = [name for name in KERNELS if name != "torch"]


@pytest.mark.parametrize("kernels", NATIVE)
def test_of_equal_keys_the_first_ones_are_chosen(kernels: str) -> None:
    batch = make_attention_batch(REQUESTS[:2], num_decodes=2)
    index = filled_cache(64, 32, torch.float32, torch.float32)
    q = drawn(2, 3, 64, dtype=torch.float32)
    q[0, 1] = float("nan")
    got = KERNELS[kernels].choose_keys(q, torch.zeros(2, 3), index, batch, 8)
    assert got.tolist() == [[*range(8)], [*range(5), -1, -1, -1]]


@pytest.mark.parametrize("kernels", NATIVE[-1:])
def test_scores_of_long_prompts_are_computed_piece_by_piece(kernels: str) -> None:
    """More scores than are kept at once, and results that are made for some tokens alone."""
    pages, num_new = tuple(range(511, -1, -1)), 700
    batch = make_attention_batch([NewTokens([0] * num_new, 8192 - num_new, pages)], num_decodes=0)
    index = drawn(512, 1, PAGE, 32, dtype=torch.float32)
    q, weights = (drawn(num_new, 2, size, dtype=torch.float32, seed=size) for size in (32, 1))
    got = KERNELS[kernels].choose_keys(q, weights[..., 0].abs(), index, batch, 5)
    last = AttentionBatch(
        page_table=batch.page_table,
        query_start=torch.tensor([0, 9], dtype=torch.int32),
        context_len=batch.context_len,
        query_lens=(9,),
        context_lens=batch.context_lens,
        num_decodes=0,
    )
    expected = KERNELS["torch"].choose_keys(q[-9:], weights[-9:, :, 0].abs(), index, last, 5)
    assert torch.equal(got[-9:], expected)
    again = KERNELS[kernels].choose_keys(q[-9:], weights[-9:, :, 0].abs(), index, last, 5)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("kernels", NATIVE[-1:])
def test_what_does_not_fit_is_refused(kernels: str) -> None:
    one, batch = KERNELS[kernels], make_attention_batch(REQUESTS[:1], num_decodes=1)
    index = filled_cache(64, 32, torch.float32, torch.float32)
    q, weights = torch.zeros(1, 3, 64), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="do not fit q"):
        one.choose_keys(q, weights[:, :2], index, batch, 4)
    with pytest.raises(ValueError, match="does not fit 1 new tokens"):
        one.choose_keys(q.repeat(2, 1, 1), weights.repeat(2, 1), index, batch, 4)
    with pytest.raises(IndexError, match="names page 19 but the cache has pages 0 to 11"):
        one.choose_keys(q, weights, index[:12], batch, 4)
    with pytest.raises(IndexError, match="names page"):
        one.sparse_latent_attention(q, index[:12], batch, 0.1, 32, torch.tensor([[3, 298]]))


def test_few_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts are computed piece by piece, with the same result."""
    batch = make_attention_batch(REQUESTS, num_decodes=NUM_DECODES)
    index = filled_cache(48, 32, torch.float32, torch.float32)
    q = drawn(NUM_TOKENS, 12, 48, dtype=torch.float32, seed=5)
    weights = drawn(NUM_TOKENS, 12, dtype=torch.float32, seed=6)
    whole = KERNELS["torch"].choose_keys(q, weights, index, batch, 7)
    monkeypatch.setattr("sapwood.kernels.torch_ops.latent._NUMBERS_AT_ONCE", 1500)
    assert torch.equal(KERNELS["torch"].choose_keys(q, weights, index, batch, 7), whole)
