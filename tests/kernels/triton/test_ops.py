"""The Triton kernels of a decoder layer against ReferenceKernels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.kv_cache import kv_cache_shape
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.triton.ops import TritonKernels

REFERENCE = ReferenceKernels()
TRITON = TritonKernels()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Absolute and relative. The interpreter cuts bfloat16 off where the GPU rounds, which is twice the
error; a normed head is rounded once more in the reference."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.cpu(), want.cpu(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 96), (2, 5000), (0, 64)])
def test_rms_norm(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 2 * width, device=device) * 3).to(dtype)[:, :width]
    weight = torch.randn(width, device=device).to(dtype)
    close(TRITON.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    residual = torch.randn(rows, width, device=device).to(dtype)
    want_normed, want_sum = REFERENCE.add_rms_norm(x, residual.clone(), weight, 1e-5)
    normed, total = TRITON.add_rms_norm(x, residual, weight, 1e-5)
    close(normed, want_normed)
    close(total, want_sum)


@pytest.mark.parametrize("first", [0, 3], ids=["whole words", "bytes"])
def test_rows_go_to_the_device_and_back(device: torch.device, first: int) -> None:
    columns = slice(first, first + 4_096)
    source = torch.randint(0, 256, (5, 4_104), dtype=torch.uint8)
    host = source.pin_memory() if device.type == "cuda" else source
    there = torch.zeros(4, 5_000, dtype=torch.uint8, device=device)
    TRITON.carry_rows(host[:, columns], there[:, columns], [4, 0], [3, 1])
    assert torch.equal(there[[3, 1]][:, columns].cpu(), source[[4, 0]][:, columns])
    assert not there[[0, 2]].any()
    assert not there[:, columns.stop :].any()
    TRITON.carry_rows(there[:, columns], host[:, columns], [3], [2])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    assert torch.equal(host[2, columns], source[4, columns])


def test_rms_norm_of_small_numbers_heeds_epsilon(device: torch.device) -> None:
    x, weight = torch.randn(2, 32, device=device) * 1e-3, torch.ones(32, device=device)
    close(TRITON.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 96), (2, 5000), (0, 64)])
def test_layer_norm(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 2 * width, device=device) * 3 + 5).to(dtype)[:, :width]
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    for given in ((weight, bias), (weight, None), (None, None)):
        close(TRITON.layer_norm(x, *given, 1e-5), REFERENCE.layer_norm(x, *given, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(Activation))
def test_activations(device: torch.device, activation: Activation, dtype: torch.dtype) -> None:
    for width in (24, 1030):
        x = (torch.randn(3, 2 * width, device=device) * 3).to(dtype)
        close(TRITON.activate(x[:, 1:], activation), REFERENCE.activate(x[:, 1:], activation))
        want = REFERENCE.activate_and_mul(x, activation)
        close(TRITON.activate_and_mul(x, activation), want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_embedding(device: torch.device, dtype: torch.dtype) -> None:
    table = (torch.randn(19, 1100, device=device) * 20).to(dtype)
    ids = torch.randint(0, 19, (5,), device=device)
    assert torch.equal(TRITON.embedding(ids, table), table[ids])


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim", "norms", "page_size", "dtype"),
    [
        ((4, 4), 64, 64, "neither", 4, torch.float32),
        ((9, 3), 64, 32, "both", 4, torch.float32),
        ((8, 2), 128, 128, "both", 16, torch.bfloat16),
        ((5, 1), 80, 20, "q", 1, torch.float32),
        ((2, 1), 256, 64, "k", 8, torch.float16),
        ((2, 2), 96, 96, "both", 2, torch.float32),
    ],
    ids=str,
)
def test_qk_norm_rope_write_kv(
    device: torch.device,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    norms: str,
    page_size: int,
    dtype: torch.dtype,
) -> None:
    num_heads, num_kv_heads = heads
    num_tokens = 5
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(num_tokens, width, device=device).to(dtype)
    q_norm, k_norm = (torch.randn(head_dim, device=device).to(dtype) for _ in "qk")
    cos_sin = torch.randn(300, rotary_dim, device=device)
    positions = torch.randint(0, 300, (num_tokens,), device=device)
    write_index = torch.randperm(9 * page_size, device=device)[:num_tokens]
    # Pages of one layer lie apart, as memory/buffers.py has them.
    shape = kv_cache_shape(9, num_kv_heads, page_size, head_dim)
    pools = [torch.zeros(9, 2, 2, *shape[1:], dtype=dtype, device=device) for _ in range(2)]
    queries = []
    for kernels, pool in zip((REFERENCE, TRITON), pools, strict=True):
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
            key_cache=pool[:, 1, 0],
            value_cache=pool[:, 1, 1],
            write_index=write_index,
        )
        queries.append(q)
    close(queries[1], queries[0])
    close(pools[1], pools[0])
    assert torch.equal(pools[1][:, 1, 1], pools[0][:, 1, 1])


def test_negative_write_indices_write_nothing(device: torch.device) -> None:
    key_cache, value_cache = (torch.zeros(3, 1, 4, 32, device=device) for _ in "kv")
    TRITON.qk_norm_rope_write_kv(
        torch.ones(3, 3 * 32, device=device),
        num_heads=1,
        num_kv_heads=1,
        head_dim=32,
        q_norm=None,
        k_norm=None,
        eps=1e-6,
        cos_sin=torch.ones(8, 32, device=device),
        positions=torch.zeros(3, dtype=torch.int64, device=device),
        key_cache=key_cache,
        value_cache=value_cache,
        write_index=torch.tensor([-1, 6, -1], device=device),
    )
    assert value_cache.sum() == 32
    assert value_cache[1, 0, 2].sum() == 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 33, 9000])
def test_argmax_is_the_first_of_equal_ones(
    device: torch.device, vocab: int, dtype: torch.dtype
) -> None:
    logits = torch.randn(4, vocab, device=device).to(dtype)
    logits[1] = 2.0
    logits[2] = -torch.inf
    logits[3, [0, vocab // 2, vocab - 1]] = 50.0
    got = TRITON.argmax(logits)
    assert got.tolist() == [int(logits[0].argmax()), 0, 0, 0]
    assert got.dtype == torch.int64


def test_a_row_of_nan_gives_some_token(device: torch.device) -> None:
    logits = torch.full((2, 100), torch.nan, device=device)
    logits[1, 70] = 1.0
    first, second = TRITON.argmax(logits).tolist()
    assert 0 <= first < 100
    assert second == 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "rows"), [(1, [0]), (33, [2, 0]), (2100, [0, 1, 2]), (32, [])])
def test_mask_logits(
    device: torch.device, vocab: int, rows: Sequence[int], dtype: torch.dtype
) -> None:
    logits = torch.randn(3, vocab, device=device).to(dtype)
    masks = torch.randint(-(2**31), 2**31, (len(rows), -(-vocab // 32))).to(torch.int32)
    want = logits.clone()
    REFERENCE.mask_logits(want, masks, rows)
    TRITON.mask_logits(logits, masks, rows)
    assert torch.equal(logits, want)


def test_penalties(device: torch.device) -> None:
    logits = torch.randn(1500, device=device) * 3
    ids = torch.randperm(1500, device=device)[:1100]
    counts = torch.randint(0, 4, (1100,), device=device).float()
    want = logits.clone()
    how = {"repetition": 1.3, "frequency": 0.25, "presence": 0.5}
    REFERENCE.penalise(want, ids, counts, **how)
    TRITON.penalise(logits, ids, counts, **how)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_dense_layers(device: torch.device) -> None:
    x, weight = torch.randn(3, 33, device=device), torch.randn(5, 33, device=device)
    bias = torch.randn(5, device=device)
    for given in (bias, None):
        want = REFERENCE.pack_linear(weight, given)(x)
        layer = TRITON.pack_linear(weight, given)
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)
        half = TRITON.pack_linear(weight.bfloat16(), None if given is None else given.bfloat16())
        assert half(x.bfloat16()).dtype == torch.bfloat16
        wide = half.fp32(x.bfloat16())
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide, want, atol=0.2, rtol=0.05)
