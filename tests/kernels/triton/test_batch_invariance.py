"""With fixed tiles and chunks, a row's result is the same bit by bit, whatever other rows there
are and however a request's tokens are cut into steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import AttentionTraits
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.kv_cache import KV_CACHE_DTYPES
from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.reference.quantized import quantize
from sapwood.kernels.routing import Routing
from sapwood.kernels.triton.attention_sizes import FIXED_CHUNK
from sapwood.kernels.triton.experts import GroupedExperts
from sapwood.kernels.triton.ops import TritonKernels
from tests.kernels.test_coded import random_weight
from tests.kernels.test_low_rank import addition, rows_of
from tests.kernels.triton.attention_cases import ATTENTION, Case, make_case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
ROWS = (1, 17, 65, 130)
"""Numbers of rows for which tiles would have three sizes."""
CHUNK = 128
assert FIXED_CHUNK % CHUNK == 0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.fixture
def kernels() -> TritonKernels:
    made = TritonKernels()
    made.set_exact_products(True)
    assert made.exact_products
    return made


def layers(kernels: TritonKernels, dtype: torch.dtype, device: torch.device) -> list[PackedLinear]:
    weight = torch.randn(80, 160)
    parts: list[LinearPart] = [
        quantize(weight, "int8"),
        random_weight("e4m3", (80, 160, 32)),
        random_weight("int4", (80, 160, 32)),
    ]
    bias = torch.randn(80, dtype=dtype, device=device)
    quantised = [kernels.pack_quantized_linear([one.to(device)], bias, dtype) for one in parts]
    return [kernels.pack_linear(weight.to(device, dtype), bias), *quantised]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(kernels: TritonKernels, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(max(ROWS), 160).to(device, dtype)
    for index, layer in enumerate(layers(kernels, dtype, device)):
        whole, whole_fp32 = layer(x), layer.fp32(x)
        for rows in ROWS[:-1]:
            own = slice(rows, 2 * rows) if 2 * rows <= len(x) else slice(0, rows)
            assert torch.equal(layer(x[own]), whole[own]), (index, rows)
            assert torch.equal(layer.fp32(x[own]), whole_fp32[own]), (index, rows)


def test_a_dense_product_is_right(kernels: TritonKernels, device: torch.device) -> None:
    x, weight = torch.randn(70, 200), torch.randn(90, 200)
    bias = torch.randn(90)
    got = kernels.pack_linear(weight.to(device), bias.to(device))(x.to(device))
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (got.cpu() - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(kernels: TritonKernels, dtype: torch.dtype, device: torch.device) -> None:
    num_experts, hidden, inner = 4, 32, 48
    gate_up, down = [
        [
            kernels.pack_linear(torch.randn(shape).to(device, dtype), None)
            for _ in range(num_experts)
        ]
        for shape in ((2 * inner, hidden), (hidden, inner))
    ]
    packed = kernels.pack_experts(gate_up, down, Activation.SILU)
    assert isinstance(packed, GroupedExperts)
    x = torch.randn(140, hidden).to(device, dtype)
    logits = torch.randn(140, num_experts, device=device)
    weights, chosen = kernels.route(logits, None, Routing(num_chosen=3, renormalise=True))
    whole = packed(x, chosen, weights)
    for rows in (1, 17, 65):
        own = slice(50, 50 + rows)
        assert torch.equal(packed(x[own], chosen[own], weights[own]), whole[own])


def cut(case: Case, begins: list[int], ends: list[int]) -> Case:
    """The step in which request r of a batch of whole prompts computes begins[r] .. ends[r]; none
    if they are equal."""
    computed = [r for r, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin < end]
    # Decodes come first.
    computed.sort(key=lambda r: ends[r] - begins[r] > 1)
    starts = case.batch.query_start.tolist()
    lens = [ends[r] - begins[r] for r in computed]
    device = case.q.device
    batch = replace(
        case.batch,
        page_table=case.batch.page_table[computed],
        query_start=torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=device),
        context_len=torch.tensor([ends[r] for r in computed], dtype=torch.int32, device=device),
        query_lens=tuple(lens),
        context_lens=tuple(ends[r] for r in computed),
        num_decodes=sum(length == 1 for length in lens),
        host_page_table=None,
    )
    q = torch.cat([case.q[starts[r] + begins[r] : starts[r] + ends[r]] for r in computed])
    return replace(case, q=q, batch=batch)


def attended(case: Case, traits: AttentionTraits) -> Tensor:
    scale = case.q.shape[2] ** -0.5
    return ATTENTION(case.q, case.key_cache, case.value_cache, case.batch, scale, traits, CHUNK)


TRAITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 37},
    "sinks, cap": {"sinks": 0.5, "soft_cap": 5.0},
    "alibi": {"alibi": 0.1},
}


@pytest.mark.parametrize(
    ("name", "dtype", "kv", "page_size", "heads"),
    [
        ("plain", torch.float32, None, 16, (2, 2)),
        ("plain", torch.bfloat16, "int8", 16, (6, 2)),
        ("window", torch.bfloat16, None, 7, (4, 1)),
        ("sinks, cap", torch.float16, None, 128, (3, 1)),
        ("alibi", torch.float32, "fp8_e4m3", 16, (2, 1)),
    ],
)
def test_attention(
    name: str,
    dtype: torch.dtype,
    kv: str | None,
    page_size: int,
    heads: tuple[int, int],
    device: torch.device,
) -> None:
    """Whole prompts; token by token; in chunks of 50, beside a decode; with another width of the
    page table; and as what the reference computes."""
    lengths = [1, 100, 150]
    case = make_case(
        [(length, length) for length in lengths],
        heads=heads,
        head_dim=32,
        page_size=page_size,
        dtype=dtype,
        kv_dtype=None if kv is None else KV_CACHE_DTYPES[kv],
        device=device,
    )
    values: dict[str, Any] = {
        key: value
        if key in ("window", "soft_cap")
        else torch.full((heads[0],), value, device=device)
        for key, value in TRAITS[name].items()
    }
    traits = AttentionTraits(**values)
    # Not the batch's own number of decodes, so that all of it takes one way.
    whole = replace(case, batch=replace(case.batch, num_decodes=0))
    want = attended(whole, traits)
    usual = ATTENTION(
        case.q, case.key_cache, case.value_cache, case.batch, case.q.shape[2] ** -0.5, traits
    )
    torch.testing.assert_close(want, usual, rtol=2**-6, atol=2**-6)
    starts = [0, *accumulate(lengths)]

    def check(begins: list[int], ends: list[int]) -> None:
        part = cut(case, begins, ends)
        got = attended(part, traits)
        at = 0
        order = sorted(range(3), key=lambda r: ends[r] - begins[r] > 1)
        for r in order:
            length = ends[r] - begins[r]
            own = want[starts[r] + begins[r] : starts[r] + ends[r]]
            assert torch.equal(got[at : at + length], own), (r, begins, ends)
            at += length

    for end in (50, 100):
        check([0, end - 50, end - 1], [1, end, end])  # a chunk beside two decodes
    check([0, 0, 100], [1, 0, 150])
    check([1, 99, 127], [1, 100, 128])
    check([1, 63, 128], [1, 64, 129])


def test_adapters(kernels: TritonKernels, device: torch.device) -> None:
    """Additions of an adapter to the same rows, alone and between rows of others."""
    layer = kernels.low_rank(50, 100)
    layer.place(0, addition(50, [(0, 70, 4), (70, 20, 33)], torch.float32).to(device))
    layer.place(1, addition(50, [(0, 100, 16)], torch.float32).to(device))
    x, slots = torch.randn(37, 50, device=device), [0, 1, -1] * 12 + [1]

    def added(own: slice) -> Tensor:
        rows = rows_of(slots[own])
        out = torch.ones(len(slots[own]), 100, device=device)
        layer.add(x[own], out, replace(rows, rows=rows.rows.to(device)))
        return out

    whole = added(slice(None))
    for row in (0, 1, 34, 36):
        assert torch.equal(added(slice(row, row + 1))[0], whole[row])
