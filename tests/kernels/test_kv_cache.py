"""The KV cache in 8 bits: what it stores, and every implementation of the ops against the
reference ones, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import (
    LARGEST_NUMBER,
    dequantize_pages,
    kv_cache_shape,
    numbers_and_scales,
    quantize,
    top_numbers,
    write,
)
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from tests.kernels.test_cpu_kernels import make_batch
from tests.tiers import sweep

REFERENCE = ReferenceKernels()
EPS = 1e-5
IMPLEMENTATIONS = ["torch", *CpuKernels.usable_isas()]
DTYPES = [torch.float32, torch.bfloat16]

STEP = {torch.int8: 1 / 127, torch.float8_e4m3fn: 1 / 8, torch.float8_e5m2: 1 / 4}
"""The widest distance of two neighbouring numbers, of the largest entry (int8) or the entry."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
"""Of the largest entry: bf16 rounds probabilities, and here what was dequantised too."""


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "torch":
        return TorchKernels()
    return CpuKernels(isa=request.param, num_threads=2)


@pytest.fixture(params=list(LARGEST_NUMBER), ids=["int8", "e4m3", "e5m2"])
def kv_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


def empty_cache(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """All bytes 255: of scales and fp8 numbers that is NaN, and reading them would show."""
    shape = kv_cache_shape(num_pages, num_kv_heads, page_size, head_dim, dtype)
    return torch.full(shape, 255, dtype=torch.uint8).view(dtype)


def random_cache(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """Page 0 is nobody's."""
    cache = empty_cache(num_pages, num_kv_heads, page_size, head_dim, dtype)
    write_index = torch.arange(page_size, num_pages * page_size)
    write(cache, write_index, torch.randn(len(write_index), num_kv_heads, head_dim))
    return cache


def read(cache: Tensor, head_dim: int) -> Tensor:
    return dequantize_pages(cache, torch.arange(len(cache)), head_dim, torch.float32)


class TestNumbers:
    def test_an_entry_is_off_by_half_a_step_at_most(self, kv_dtype: torch.dtype) -> None:
        x = torch.randn(200, 64) * torch.logspace(-20, 20, 200)[:, None]
        numbers, scales = quantize(x, kv_dtype)
        error = (numbers.float() * scales.float()[:, None] - x).abs()
        top = x.abs().amax(dim=1, keepdim=True)
        size = top if kv_dtype == torch.int8 else x.abs()
        # Near zero fp8's steps no longer shrink; the scale is up to 2**-7 more than it must be.
        smallest = top * (2**-9 / 448 if kv_dtype == torch.float8_e4m3fn else 2**-16 / 57344)
        assert (error <= STEP[kv_dtype] / 2 * (1 + 2**-7) * size + smallest).all()
        assert (numbers.float().abs() <= LARGEST_NUMBER[kv_dtype]).all()

    def test_zero_stays_zero_and_what_is_not_finite_shows(self, kv_dtype: torch.dtype) -> None:
        x = torch.zeros(3, 32)
        x[1, 3], x[2, 5] = torch.nan, -torch.inf
        numbers, scales = quantize(x, kv_dtype)
        assert not (numbers[0].float() * scales[0].float()).any()
        assert scales[1].isnan()
        assert scales[2].isinf()

    def test_a_token_takes_a_byte_per_entry_and_two_for_its_scale(
        self, kv_dtype: torch.dtype
    ) -> None:
        cache = empty_cache(3, 2, 16, 64, kv_dtype)
        assert cache.nbytes == 3 * 2 * 16 * (64 + 2)
        numbers, scales = numbers_and_scales(cache, 64)
        numbers.zero_()
        assert scales.isnan().all()
        assert (cache.view(torch.uint8) == 255).sum() == 3 * 2 * 16 * 2

    @pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
    def test_fp8_takes_the_scale_with_the_smallest_error(self, kind: torch.dtype) -> None:
        x = torch.randn(500, 64)
        numbers, scales = quantize(x, kind)
        found = (numbers.float() * scales.float()[:, None] - x).square().sum(1)
        for number in top_numbers(kind):
            # Scales are rounded up to 2**-7 more, which moves what is near a boundary.
            scale = (x.abs().amax(1, keepdim=True) / number) * (1 + 2**-8)
            error = ((x / scale).to(kind).float() * scale - x).square().sum(1)
            assert (found < 1.3 * error).all()
            assert found.mean() < 0.9 * error.mean()


class TestWrite:
    @sweep(
        kernels=IMPLEMENTATIONS,
        kv_dtype=list(LARGEST_NUMBER),
        dtype=DTYPES,
        shape=[((3, 3), 64), ((1, 4), 96), ((2, 1), 128)],
        page_size=[1, 16, 24],
        indirect=("kernels", "kv_dtype", "dtype"),
    )
    def test_matches_and_writes_only_its_place(
        self,
        kernels: Kernels,
        kv_dtype: torch.dtype,
        dtype: torch.dtype,
        shape: tuple[tuple[int, int], int],
        page_size: int,
    ) -> None:
        (num_kv_heads, group), head_dim = shape
        num_tokens, num_pages = 11, 20
        angle = torch.rand(100, head_dim // 2) * 6
        write_index = torch.randperm(num_pages * page_size)[:num_tokens]
        arguments = {
            "num_heads": num_kv_heads * group,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "q_norm": torch.randn(head_dim).to(dtype),
            "k_norm": torch.randn(head_dim).to(dtype),
            "eps": EPS,
            "cos_sin": torch.cat((angle.cos(), angle.sin()), dim=1),
            "positions": torch.randint(0, 100, (num_tokens,)),
            "write_index": write_index,
        }
        qkv = torch.randn(num_tokens, num_kv_heads * (group + 2) * head_dim).to(dtype)
        # Two layers of one pool, as memory/buffers.py makes them; the second must not change.
        whole = [
            empty_cache(num_pages, 4 * num_kv_heads, page_size, head_dim, kv_dtype)
            for _ in range(2)
        ]
        caches = [pool.unflatten(1, (2, 2, num_kv_heads)) for pool in whole]
        for ops, pool in zip((kernels, REFERENCE), caches, strict=True):
            ops.qk_norm_rope_write_kv(
                qkv.clone(), key_cache=pool[:, 0, 0], value_cache=pool[:, 0, 1], **arguments
            )
        dense = torch.zeros(2, num_pages, num_kv_heads, page_size, head_dim, dtype=dtype)
        REFERENCE.qk_norm_rope_write_kv(
            qkv.clone(), key_cache=dense[0], value_cache=dense[1], **arguments
        )
        is_written = torch.zeros(num_pages * page_size, dtype=torch.bool)
        is_written[write_index] = True
        for side in range(2):
            actual, expected = (
                read(pool[:, 0, side], head_dim).transpose(1, 2).flatten(0, 1) for pool in caches
            )
            assert actual[~is_written].isnan().all()
            error = (actual - expected)[is_written].abs()
            top = expected[is_written].abs().amax(dim=-1, keepdim=True)
            size = top if kv_dtype == torch.int8 else expected[is_written].abs()
            # One of the two may round to the next number; keys are first rounded to bf16 there,
            # which may make another of fp8's scales the best one.
            assert (error <= STEP[kv_dtype] * size + 2**-6 * top).all()
            exact = dense[side].float().transpose(1, 2).flatten(0, 1)
            errors = [(found - exact)[is_written].norm() for found in (actual, expected)]
            assert errors[0] < 1.05 * errors[1]
            assert (caches[0][:, 1].view(torch.uint8) == 255).all()


class TestAttention:
    @sweep(
        kernels=IMPLEMENTATIONS,
        kv_dtype=list(LARGEST_NUMBER),
        dtype=DTYPES,
        shape=[
            ((3, 3), 64, 16),
            ((2, 1), 96, 1),
            ((1, 8), 128, 24),
            ((1, 12), 64, 32),
            ((2, 2), 256, 7),
        ],
        indirect=("kernels", "kv_dtype", "dtype"),
    )
    def test_ragged_batch(
        self,
        kernels: Kernels,
        kv_dtype: torch.dtype,
        dtype: torch.dtype,
        shape: tuple[tuple[int, int], int, int],
    ) -> None:
        """Of each shape: heads, head size, page size."""
        self.check(
            kernels, kv_dtype, dtype, *shape,
            query_lens=[1, 1, 1, 1, 5, 70, 33], context_lens=[1, 31, 64, 131, 5, 200, 64],
        )  # fmt: skip

    def test_a_long_context_is_split_and_merged(
        self, kernels: Kernels, kv_dtype: torch.dtype
    ) -> None:
        for query_lens in ([1], [4]):
            self.check(
                kernels, kv_dtype, torch.bfloat16, (1, 3), 64, 16,
                query_lens=query_lens, context_lens=[1501],
            )  # fmt: skip

    @staticmethod
    def check(
        kernels: Kernels,
        kv_dtype: torch.dtype,
        dtype: torch.dtype,
        heads: tuple[int, int],
        head_dim: int,
        page_size: int,
        *,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
    ) -> None:
        num_kv_heads, group = heads
        batch, num_pages = make_batch(query_lens, context_lens, page_size)
        keys, values = (
            random_cache(num_pages, num_kv_heads, page_size, head_dim, kv_dtype) for _ in range(2)
        )
        q = torch.randn(sum(query_lens), num_kv_heads * group, head_dim).to(dtype)
        actual = kernels.paged_attention(q, keys, values, batch, head_dim**-0.5)
        expected = REFERENCE.paged_attention(q, keys, values, batch, head_dim**-0.5)
        error = (actual.float() - expected.float()).abs().max()
        assert error <= TOLERANCE[dtype] * expected.float().abs().max()


@pytest.mark.skipif(not CpuKernels.usable_isas(), reason="no native kernels")
class TestRefusals:
    def test_keys_and_values_of_two_kinds(self) -> None:
        batch, num_pages = make_batch([1], [20], 16)
        keys = random_cache(num_pages, 1, 16, 64, torch.int8)
        q = torch.randn(1, 1, 64)
        for values in (
            random_cache(num_pages, 1, 16, 64, torch.float8_e5m2),
            torch.zeros(kv_cache_shape(num_pages, 1, 16, 64)),
        ):
            with pytest.raises(ValueError, match=r"KV cache|differ"):
                CpuKernels().paged_attention(q, keys, values, batch, 1.0)

    def test_a_cache_without_room_for_scales(self) -> None:
        batch, num_pages = make_batch([1], [20], 16)
        cache = torch.zeros(num_pages, 1, 16, 64, dtype=torch.int8)
        with pytest.raises(ValueError, match=r"page_size, 66\]"):
            CpuKernels().paged_attention(torch.randn(1, 1, 64), cache, cache, batch, 1.0)
