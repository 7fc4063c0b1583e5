"""The C++ kernels against the reference ones, on every instruction set that this machine has."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.kv_cache import kv_cache_shape
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need, select_kernels
from tests.tiers import sweep

_ISAS = CpuKernels.usable_isas()
_NEED = Need(device="cpu", dtype=torch.float32, head_dim=64, page_size=16)

pytestmark = pytest.mark.skipif(not _ISAS, reason=f"no native kernels: {CpuKernels.why_not(_NEED)}")

REFERENCE = ReferenceKernels()
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}
"""Of the largest entry. fp32 differs by the order of sums; bf16 by one rounding of the result
(2**-8 relative) and, in attention, of the probabilities."""


@pytest.fixture(params=_ISAS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(isa=request.param, num_threads=2)


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = (actual.float() - expected.float()).abs().max().item()
    largest = max(1e-3, expected.float().abs().max().item())
    assert error <= TOLERANCE[expected.dtype] * largest


def make_batch(
    query_lens: Sequence[int], context_lens: Sequence[int], page_size: int
) -> tuple[AttentionBatch, int]:
    """A batch whose pages are scattered, and the number of pages; page 0 belongs to no request."""
    counts = [-(-length // page_size) for length in context_lens]
    pages = (torch.randperm(sum(counts)) + 1).to(torch.int32).split(counts)
    page_table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    for row, mine in zip(page_table, pages, strict=True):
        row[: len(mine)] = mine
    batch = AttentionBatch(
        page_table=page_table,
        query_start=torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32),
        context_len=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_decodes=sum(1 for _ in itertools.takewhile(lambda n: n == 1, query_lens)),
    )
    return batch, sum(counts) + 1


def check_attention(
    kernels: CpuKernels,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
) -> AttentionBatch:
    num_kv_heads, group = heads
    batch, num_pages = make_batch(query_lens, context_lens, page_size)
    shape = kv_cache_shape(num_pages, num_kv_heads, page_size, head_dim)
    keys, values = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    keys[0] = values[0] = torch.nan  # nobody's page: reading it would show
    q = torch.randn(sum(query_lens), num_kv_heads * group, head_dim, dtype=dtype)
    scale = head_dim**-0.5
    actual = kernels.paged_attention(q, keys, values, batch, scale)
    assert_close(actual, REFERENCE.paged_attention(q, keys, values, batch, scale))
    return batch


class TestRows:
    @pytest.mark.parametrize("shape", [(1, 576), (3, 100), (1, 5), (37, 2048), (200, 576)])
    def test_norms(self, kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        weight = torch.randn(shape[1], dtype=dtype)
        assert_close(kernels.rms_norm(x, weight, EPS), REFERENCE.rms_norm(x, weight, EPS))
        expected = REFERENCE.add_rms_norm(x, residual.clone(), weight, EPS)
        normed, total = kernels.add_rms_norm(x, residual, weight, EPS)
        assert_close(normed, expected[0])
        assert torch.equal(total, expected[1])

    @pytest.mark.parametrize("shape", [(1, 3072), (5, 34), (64, 1026)])
    def test_silu(self, kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        x = torch.randn(shape, dtype=dtype) * 4
        x[0, 0], x[0, 1] = -200.0, 200.0  # exp must neither overflow nor give NaN
        assert_close(
            kernels.activate_and_mul(x, Activation.SILU),
            REFERENCE.activate_and_mul(x, Activation.SILU),
        )

    @pytest.mark.parametrize("shape", [(1, 1), (2, 63), (3, 64), (5, 1000), (0, 7)])
    def test_argmax(self, kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        x = torch.randint(-9, 9, shape).to(dtype)  # many equal ones: the first counts
        expected = [row.index(max(row)) for row in x.tolist()]
        assert kernels.argmax(x).tolist() == expected
        assert kernels.argmax(torch.full_like(x, -torch.inf)).tolist() == [0] * shape[0]

    def test_argmax_passes_over_nan(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        x = torch.full((1, 200), torch.nan, dtype=dtype)
        assert kernels.argmax(x).tolist() == [0]
        x[0, 150] = -3.0
        assert kernels.argmax(x).tolist() == [150]

    def test_embedding(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        weight = torch.randn(50, 24, dtype=dtype)
        token_ids = torch.tensor([49, 0, 7, 7])
        assert torch.equal(kernels.embedding(token_ids, weight), weight[token_ids])
        with pytest.raises(IndexError, match=r"token_ids\[1\] is 50 but must be in \[0, 50\)"):
            kernels.embedding(torch.tensor([3, 50]), weight)

    def test_nan_stays(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        x = torch.full((1, 64), torch.nan, dtype=dtype)
        assert kernels.rms_norm(x, torch.ones(64, dtype=dtype), EPS).isnan().all()

    def test_rows_apart_are_handled(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        x = torch.randn(6, 128, dtype=dtype)[::2, :64]
        weight = torch.randn(64, dtype=dtype)
        assert_close(kernels.rms_norm(x, weight, EPS), REFERENCE.rms_norm(x, weight, EPS))
        assert_close(
            kernels.activate_and_mul(x, Activation.SILU),
            REFERENCE.activate_and_mul(x, Activation.SILU),
        )
        layer = torch.randn(10, 64, dtype=dtype)
        assert_close(kernels.pack_linear(layer, None)(x), REFERENCE.pack_linear(layer, None)(x))


class TestLinear:
    @sweep(
        kernels=_ISAS,
        dtype=DTYPES,
        rows=[1, 2, 7, 12, 13, 40, 130],
        size=[(96, 64), (37, 576), (5, 50), (960, 1600)],
        indirect=("kernels", "dtype"),
    )
    def test_sizes(
        self, kernels: CpuKernels, dtype: torch.dtype, rows: int, size: tuple[int, int]
    ) -> None:
        num_out, num_in = size
        weight = torch.randn(num_out, num_in, dtype=dtype)
        bias = torch.randn(num_out, dtype=dtype)
        x = torch.randn(rows, num_in, dtype=dtype)
        for b in (bias, None):
            expected = REFERENCE.pack_linear(weight, b)(x)
            assert_close(kernels.pack_linear(weight, b)(x), expected)

    def test_no_rows(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        layer = kernels.pack_linear(torch.randn(64, 32, dtype=dtype), None)
        assert layer(torch.empty(0, 32, dtype=dtype)).shape == (0, 64)
        assert kernels.activate_and_mul(torch.empty(0, 32, dtype=dtype), Activation.SILU).shape == (
            0,
            16,
        )

    def test_odd_input_size(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        weight, x = torch.randn(33, 51, dtype=dtype), torch.randn(4, 51, dtype=dtype)
        expected = REFERENCE.pack_linear(weight, None)(x)
        assert_close(kernels.pack_linear(weight, None)(x), expected)

    def test_weight_may_change_after_packing(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        weight, x = torch.randn(64, 32, dtype=dtype), torch.randn(2, 32, dtype=dtype)
        expected = REFERENCE.pack_linear(weight.clone(), None)(x)
        layer = kernels.pack_linear(weight, None)
        weight.zero_()
        assert_close(layer(x), expected)

    def test_refuses_what_does_not_fit(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        layer = kernels.pack_linear(torch.randn(64, 32, dtype=dtype), None)
        with pytest.raises(ValueError, match=r"does not fit a weight \[64, 32\]"):
            layer(torch.randn(2, 31, dtype=dtype))
        with pytest.raises(ValueError, match="bias"):
            kernels.pack_linear(torch.randn(64, 32, dtype=dtype), torch.randn(63, dtype=dtype))


class TestRopeAndKvWrite:
    @sweep(
        kernels=_ISAS,
        dtype=DTYPES,
        heads=[(3, 3), (1, 8), (2, 1)],
        dims=[(64, 64), (96, 24), (128, 128), (256, 64)],
        page_size=[1, 16, 32],
        normed=[False, True],
        indirect=("kernels", "dtype"),
    )
    def test_matches_and_writes_only_its_place(
        self,
        kernels: CpuKernels,
        dtype: torch.dtype,
        heads: tuple[int, int],
        dims: tuple[int, int],
        page_size: int,
        normed: bool,
    ) -> None:
        num_kv_heads, group = heads
        head_dim, rotary_dim = dims
        num_tokens, num_pages = 11, 40
        width = num_kv_heads * (group + 2) * head_dim
        # The caches are the middle of larger ones, whose ends must not change.
        whole = torch.randn(2, *kv_cache_shape(num_pages + 2, num_kv_heads, page_size, head_dim))
        actual, expected = whole.to(dtype), whole.to(dtype)
        angle = torch.rand(100, rotary_dim // 2) * 6
        arguments = {
            "num_heads": num_kv_heads * group,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "q_norm": torch.randn(head_dim, dtype=dtype) if normed else None,
            "k_norm": torch.randn(head_dim, dtype=dtype) if normed else None,
            "eps": EPS,
            "cos_sin": torch.cat((angle.cos(), angle.sin()), dim=1),
            "positions": torch.randint(0, 100, (num_tokens,)),
            "write_index": torch.randperm(num_pages * page_size)[:num_tokens],
        }
        qkv = torch.randn(num_tokens, width, dtype=dtype)
        q = kernels.qk_norm_rope_write_kv(
            qkv.clone(), key_cache=actual[0, 1:-1], value_cache=actual[1, 1:-1], **arguments
        )
        expected_q = REFERENCE.qk_norm_rope_write_kv(
            qkv.clone(), key_cache=expected[0, 1:-1], value_cache=expected[1, 1:-1], **arguments
        )
        assert_close(q, expected_q)
        assert_close(actual, expected)
        written = torch.zeros((num_pages + 2) * page_size, dtype=torch.bool)
        written[arguments["write_index"] + page_size] = True
        by_token = actual.transpose(2, 3).flatten(1, 2)
        before = whole.to(dtype).transpose(2, 3).flatten(1, 2)
        assert torch.equal(by_token[:, ~written], before[:, ~written])

    @pytest.mark.parametrize(
        ("name", "bad", "limit"), [("positions", 100, 100), ("write_index", -1, 128)]
    )
    def test_refuses_an_index_outside(
        self, kernels: CpuKernels, name: str, bad: int, limit: int
    ) -> None:
        cache = torch.zeros(kv_cache_shape(8, 1, 16, 64))
        arguments = {"positions": torch.tensor([3]), "write_index": torch.tensor([5])}
        arguments[name] = torch.tensor([bad])
        with pytest.raises(
            IndexError, match=rf"{name}\[0\] is {bad} but must be in \[0, {limit}\)"
        ):
            kernels.qk_norm_rope_write_kv(
                torch.randn(1, 192), num_heads=1, num_kv_heads=1, head_dim=64, q_norm=None,
                k_norm=None, eps=EPS, cos_sin=torch.ones(100, 64), key_cache=cache,
                value_cache=cache.clone(), **arguments,
            )  # fmt: skip
        assert not cache.any()

    def test_refuses_a_cache_that_is_not_laid_out_in_pages(self, kernels: CpuKernels) -> None:
        cache = torch.zeros(8, 16, 1, 64).transpose(1, 2)[:, :, ::2]
        with pytest.raises(ValueError, match="each page contiguous"):
            kernels.qk_norm_rope_write_kv(
                torch.randn(1, 192), num_heads=1, num_kv_heads=1, head_dim=64, q_norm=None,
                k_norm=None, eps=EPS, cos_sin=torch.ones(100, 64), key_cache=cache,
                value_cache=cache, positions=torch.tensor([0]), write_index=torch.tensor([0]),
            )  # fmt: skip


class TestPagedAttention:
    @sweep(
        kernels=_ISAS,
        dtype=DTYPES,
        heads=[(1, 1), (3, 2), (3, 3), (2, 4), (2, 8), (1, 12)],
        head_dim=[64, 96, 128, 256],
        page_size=[1, 16, 32],
        indirect=("kernels", "dtype"),
    )
    def test_ragged_batch(
        self,
        kernels: CpuKernels,
        dtype: torch.dtype,
        heads: tuple[int, int],
        head_dim: int,
        page_size: int,
    ) -> None:
        check_attention(
            kernels,
            dtype,
            heads=heads,
            head_dim=head_dim,
            page_size=page_size,
            query_lens=[1, 1, 1, 1, 5, 70, 3, 33],
            context_lens=[1, 31, 64, 131, 5, 200, 67, 64],
        )

    def test_a_long_context_is_split_and_merged(
        self, kernels: CpuKernels, dtype: torch.dtype
    ) -> None:
        kernels.set_num_threads(3)
        for query_lens in ([1], [4]):
            batch = check_attention(
                kernels,
                dtype,
                heads=(1, 3),
                head_dim=64,
                page_size=16,
                query_lens=query_lens,
                context_lens=[1501],
            )
            (plan,) = batch.cache["cpu_plans"].values()
            assert plan.num_merges(0) > 0

    def test_keys_and_values_side_by_side(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        batch, num_pages = make_batch([1, 9], [40, 9], 16)
        both = torch.randn(num_pages, 2, 2, 16, 64, dtype=dtype)
        keys, values = both[:, 0], both[:, 1]
        rows = torch.randn(10, 3 * 4 * 64, dtype=dtype)
        q = rows[:, : 4 * 64].view(10, 4, 64)  # rows that lie apart
        actual = kernels.paged_attention(q, keys, values, batch, 0.125)
        assert_close(actual, REFERENCE.paged_attention(q, keys, values, batch, 0.125))

    def test_large_scores_do_not_overflow(self, kernels: CpuKernels, dtype: torch.dtype) -> None:
        batch, num_pages = make_batch([1, 20], [70, 20], 16)
        keys = torch.randn(kv_cache_shape(num_pages, 1, 16, 64), dtype=dtype) * 100
        values = torch.randn_like(keys)
        q = torch.randn(21, 2, 64, dtype=dtype) * 100
        actual = kernels.paged_attention(q, keys, values, batch, 1.0)
        assert_close(actual, REFERENCE.paged_attention(q, keys, values, batch, 1.0))

    def test_plan_is_made_once_per_step(self, kernels: CpuKernels) -> None:
        batch, num_pages = make_batch([1], [20], 16)
        cache = torch.randn(kv_cache_shape(num_pages, 1, 16, 64))
        q = torch.randn(1, 1, 64)
        kernels.paged_attention(q, cache, cache, batch, 1.0)
        (plan,) = batch.cache["cpu_plans"].values()
        kernels.paged_attention(q, cache, cache, batch, 1.0)
        assert list(batch.cache["cpu_plans"].values()) == [plan]

    def test_refuses_a_page_outside(self, kernels: CpuKernels) -> None:
        batch, num_pages = make_batch([1, 1], [20, 20], 16)
        batch.page_table[1, 1] = num_pages
        cache = torch.zeros(kv_cache_shape(num_pages, 1, 16, 64))
        with pytest.raises(IndexError, match=f"request 1 of the batch names page {num_pages}"):
            kernels.paged_attention(torch.randn(2, 1, 64), cache, cache, batch, 1.0)

    def test_refuses_a_batch_of_other_tokens(self, kernels: CpuKernels) -> None:
        batch, num_pages = make_batch([1, 1], [20, 20], 16)
        cache = torch.zeros(kv_cache_shape(num_pages, 1, 16, 64))
        with pytest.raises(ValueError, match="q has 3 tokens"):
            kernels.paged_attention(torch.randn(3, 1, 64), cache, cache, batch, 1.0)


class TestSelection:
    def test_why_not(self) -> None:
        assert CpuKernels.why_not(_NEED) is None
        for change, words in (
            ({"device": "cuda"}, "not on cuda"),
            ({"dtype": torch.float16}, "neither float32 nor bfloat16"),
            ({"head_dim": 80}, "head size 80 is not a multiple of 32"),
        ):
            fields = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "page_size": 16}
            reason = CpuKernels.why_not(Need(**{**fields, **change}))
            assert reason is not None
            assert words in reason

    def test_registry_prefers_them(self) -> None:
        assert select_kernels(_NEED).kernels.name == "cpu"

    def test_unknown_isa_is_refused_with_the_usable_ones(self) -> None:
        with pytest.raises(ValueError, match="usable: generic"):
            CpuKernels(isa="avx9")

    def test_default_isa_is_the_last_usable_one(self) -> None:
        assert CpuKernels().isa == _ISAS[-1]

    @pytest.mark.parametrize("num_threads", [0, 1025])
    def test_number_of_threads_is_checked(self, num_threads: int) -> None:
        with pytest.raises(ValueError, match="must be in"):
            CpuKernels(num_threads=num_threads)

    def test_float16_is_refused(self, kernels: CpuKernels) -> None:
        x = torch.randn(2, 64, dtype=torch.float16)
        with pytest.raises(TypeError, match="not float32 or bfloat16"):
            kernels.rms_norm(x, torch.ones(64, dtype=torch.float16), EPS)


class TestThreads:
    """Each layer of many small ones is a job for the pool; a lost or doubled task would show."""

    @staticmethod
    def run(kernels: CpuKernels, rounds: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(3, 256, generator=generator)
        layers = [
            kernels.pack_linear(torch.randn(256, 256, generator=generator) / 16, None)
            for _ in range(4)
        ]
        for i in range(rounds):
            x = layers[i % 4](x)
            x = kernels.rms_norm(x, torch.ones(256), EPS)
        return x

    def test_more_threads_than_cores(self) -> None:
        alone = self.run(CpuKernels(num_threads=1), 2000)
        assert torch.equal(self.run(CpuKernels(num_threads=7), 2000), alone)

    def test_the_number_may_change(self) -> None:
        kernels = CpuKernels(num_threads=3)
        expected = self.run(kernels, 20)
        for num_threads in (1, 2, 5):
            kernels.set_num_threads(num_threads)
            assert kernels.num_threads == num_threads
            assert torch.equal(self.run(kernels, 20), expected)

    def test_workers_wake_after_sleeping(self) -> None:
        kernels = CpuKernels(num_threads=3)
        expected = self.run(kernels, 4)
        for _ in range(5):
            time.sleep(0.005)  # longer than a worker spins
            assert torch.equal(self.run(kernels, 4), expected)

    def test_two_callers_share_one_object(self) -> None:
        kernels = CpuKernels(num_threads=3)
        expected = self.run(kernels, 300)
        with ThreadPoolExecutor(2) as executor:
            results = list(executor.map(lambda _: self.run(kernels, 300), range(4)))
        assert all(torch.equal(result, expected) for result in results)

    def test_works_after_a_fork(self) -> None:
        """The workers do not survive a fork; the child does their work itself."""
        code = (
            "import os, torch\n"
            "from sapwood.kernels.cpu import CpuKernels\n"
            "kernels = CpuKernels(num_threads=3)\n"
            "layer = kernels.pack_linear(torch.randn(512, 512), None)\n"
            "x = torch.randn(20, 512)\n"
            "expected = layer(x)\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    os._exit(0 if torch.equal(layer(x), expected) else 1)\n"
            "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
