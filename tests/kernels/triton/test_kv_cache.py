"""The KV cache in 8 bits: what is written, byte by byte, and attention to it."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sapwood.kernels.attention_batch import AttentionTraits
from sapwood.kernels.kv_cache import LARGEST_NUMBER, numbers_and_scales
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.triton import attention_shared_tiles
from sapwood.kernels.triton.ops import TritonKernels
from sapwood.kernels.triton.small_floats import decode, encode
from tests.kernels.test_kv_cache import STEP, empty_cache, read
from tests.kernels.triton.attention_cases import make_case
from tests.tiers import sweep

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy

TRITON, REFERENCE = TritonKernels(), ReferenceKernels()
RAGGED = [(1, 1), (1, 70), (1, 300), (3, 3), (18, 90)]

every_kv_dtype = pytest.mark.parametrize(
    "kv_dtype", list(LARGEST_NUMBER), ids=["int8", "e4m3", "e5m2"]
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@triton.jit
def _code(x_ptr, code_ptr, mantissa: tl.constexpr, bias: tl.constexpr, size: tl.constexpr):
    place = tl.arange(0, size)
    code = encode(tl.load(x_ptr + place), mantissa, bias)
    tl.store(code_ptr + place, code)
    tl.store(x_ptr + place, decode(code, 8, mantissa, bias))


@pytest.mark.parametrize(
    ("dtype", "mantissa", "bias"), [(torch.float8_e4m3fn, 3, 7), (torch.float8_e5m2, 2, 15)]
)
def test_rounding_to_fp8(
    device: torch.device, dtype: torch.dtype, mantissa: int, bias: int
) -> None:
    """Every number of the format, and what lies halfway between two and beside it."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    halves = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat((numbers, halves, halves * (1 + 2**-20), halves * (1 - 2**-20)))
    filled = torch.nn.functional.pad(x, (0, 1024 - len(x))).to(device)
    codes = torch.empty(1024, dtype=torch.int32, device=device)
    _code[(1,)](filled, codes, mantissa=mantissa, bias=bias, size=1024)
    want = x.to(dtype)
    assert torch.equal(codes.cpu()[: len(x)].to(torch.uint8), want.view(torch.uint8))
    assert torch.equal(filled.cpu()[: len(x)], want.float())


@sweep(
    strength=1,
    kv_dtype=list(LARGEST_NUMBER),
    case=[
        ((3, 3), 64, 16, torch.float32),
        ((6, 2), 96, 1, torch.bfloat16),
        ((2, 1), 128, 24, torch.float32),
    ],
)
def test_what_is_written(
    device: torch.device,
    kv_dtype: torch.dtype,
    case: tuple[tuple[int, int], int, int, torch.dtype],
) -> None:
    """Of each case: heads, head size, page size, dtype."""
    (num_heads, num_kv_heads), head_dim, page_size, dtype = case
    num_tokens, num_pages = 7, 11
    angle = torch.rand(100, head_dim // 2) * 6
    write_index = torch.randperm(num_pages * page_size)[:num_tokens]
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    qkv[1] = 0
    qkv[2] *= 1e20
    arguments = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "q_norm": None,
        "k_norm": torch.randn(head_dim).to(dtype).to(device),
        "eps": 1e-6,
        "cos_sin": torch.cat((angle.cos(), angle.sin()), dim=1).to(device),
        "positions": torch.randint(0, 100, (num_tokens,)).to(device),
        "write_index": write_index.to(device),
    }
    # Two layers of one pool, as memory/buffers.py makes them; the second must not change.
    whole = empty_cache(num_pages, 4 * num_kv_heads, page_size, head_dim, kv_dtype)
    pools = [whole.clone().to(device).unflatten(1, (2, 2, num_kv_heads)) for _ in range(2)]
    for ops, pool in zip((TRITON, REFERENCE), pools, strict=True):
        ops.qk_norm_rope_write_kv(
            qkv.to(dtype).to(device),
            key_cache=pool[:, 0, 0],
            value_cache=pool[:, 0, 1],
            **arguments,
        )
    values = [pool[:, 0, 1].cpu().view(torch.uint8) for pool in pools]
    assert torch.equal(*values)
    assert (pools[0][:, 1].cpu().view(torch.uint8) == 255).all()
    is_written = torch.zeros(num_pages * page_size, dtype=torch.bool)
    is_written[write_index] = True
    actual, expected = (
        read(pool[:, 0, 0].cpu(), head_dim).transpose(1, 2).flatten(0, 1) for pool in pools
    )
    assert actual[~is_written].isnan().all()
    error = (actual - expected)[is_written].abs()
    top = expected[is_written].abs().amax(dim=-1, keepdim=True)
    size = top if kv_dtype == torch.int8 else expected[is_written].abs()
    # Rotated keys differ by a rounding, after which one of the two may be the next number.
    assert (error <= STEP[kv_dtype] * size + 2**-6 * top).all()


@every_kv_dtype
def test_what_is_not_finite_shows(device: torch.device, kv_dtype: torch.dtype) -> None:
    cache = empty_cache(2, 1, 4, 32, kv_dtype).to(device)
    qkv = torch.ones(3, 3 * 32, device=device)
    qkv[0, 70], qkv[1, 80] = torch.nan, torch.inf
    TRITON.qk_norm_rope_write_kv(
        qkv, num_heads=1, num_kv_heads=1, head_dim=32, q_norm=None, k_norm=None, eps=1e-6,
        cos_sin=torch.ones(8, 32, device=device),
        positions=torch.zeros(3, dtype=torch.int64, device=device),
        key_cache=cache.clone(), value_cache=cache,
        write_index=torch.tensor([0, 1, -1], device=device),
    )  # fmt: skip
    scales = numbers_and_scales(cache, 32)[1][0, 0].cpu()
    assert scales[0].isnan()
    assert scales[1].isinf()
    assert (cache.cpu()[0, 0].view(torch.uint8).flatten()[64:128] == 255).all()  # not written


@sweep(
    strength=1,
    kv_dtype=list(LARGEST_NUMBER),
    case=[
        ((4, 2), 64, 16, torch.float32),
        ((3, 1), 96, 1, torch.bfloat16),
        ((2, 2), 128, 128, torch.float16),
    ],
)
def test_ragged_batch(
    device: torch.device,
    kv_dtype: torch.dtype,
    case: tuple[tuple[int, int], int, int, torch.dtype],
) -> None:
    heads, head_dim, page_size, dtype = case
    make_case(
        RAGGED, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype,
        kv_dtype=kv_dtype, device=device,
    ).check()  # fmt: skip


@every_kv_dtype
def test_window_cap_and_sinks(device: torch.device, kv_dtype: torch.dtype) -> None:
    sinks, alibi = torch.randn(4).to(device), torch.rand(4).to(device)
    traits = AttentionTraits(window=20, soft_cap=5.0, sinks=sinks, alibi=alibi)
    make_case(RAGGED, heads=(4, 2), page_size=8, kv_dtype=kv_dtype, device=device).check(traits)


@every_kv_dtype
def test_shared_pages(
    device: torch.device, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_shared_tiles, "_WORTH_SHARING", 1)
    requests = [(1, 300), (1, 290), (5, 257), (1, 400)]
    case = make_case(
        requests, heads=(4, 2), prefixes=[((0, 1, 2), 15)], kv_dtype=kv_dtype, device=device
    )
    case.check()
    assert any(key.startswith("triton shared") and of for key, of in case.batch.cache.items())
