"""A row of a product depends on that row and the weights alone: bit by bit, whatever other rows
there are, how many, and however many threads compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.blocks import FORMATS
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from tests.blocks import random_blocks
from tests.kernels.test_coded import random_weight as random_coded_weight
from tests.kernels.test_low_rank import addition
from tests.kernels.test_low_rank import rows_of as adapter_rows
from tests.tiers import sweep

_ISAS = CpuKernels.usable_isas()
pytestmark = pytest.mark.skipif(not _ISAS, reason="the native kernels are not built")

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 31, 32, 33, 40, 65, 96, 97, 130]
"""Numbers of rows on both sides of those from which kernels cut their work in another way."""
MOST = max(COUNTS)
Product = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(11)
    return


def rows_of(num_in: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes: what one row's scale did to another would show."""
    return (torch.randn(MOST, num_in) * torch.rand(MOST, 1) * 10).to(dtype)


def each_way(isa: str, make: Callable[[CpuKernels], list[Product]]) -> Iterator[list[Product]]:
    for num_threads in (1, 2):
        yield make(CpuKernels(isa=isa, num_threads=num_threads, exact_products=True))


def assert_rows_alone(isa: str, make: Callable[[CpuKernels], list[Product]], x: Tensor) -> None:
    expected: list[Tensor] = []
    for products in each_way(isa, make):
        for i, product in enumerate(products):
            if len(expected) <= i:
                expected.append(torch.cat([product(row[None]) for row in x]))
            else:
                assert torch.equal(product(x[:1]), expected[i][:1])
            for count in COUNTS:
                begin = (7 * count) % (MOST - count + 1)
                found = product(x[begin : begin + count])
                assert torch.equal(found, expected[i][begin : begin + count]), (i, count)


@sweep(isa=_ISAS, dtype=DTYPES, stored=[torch.float32, torch.bfloat16, torch.float16])
def test_dense(isa: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    if dtype == torch.bfloat16 and stored != torch.bfloat16:
        pytest.skip("activations of bfloat16 take weights of bfloat16")
    for num_out, num_in in ((70, 230), (33, 31), (300, 816)):
        weight, bias = torch.randn(num_out, num_in).to(stored), torch.randn(num_out).to(dtype)

        def make(
            kernels: CpuKernels, weight: Tensor = weight, bias: Tensor = bias
        ) -> list[Product]:
            layer = kernels.pack_linear(weight, bias, dtype)
            return [layer, layer.fp32]

        assert_rows_alone(isa, make, rows_of(num_in, dtype))


def quantized(kind: str, num_out: int, num_in: int, x_bits: int) -> QuantizedWeight:
    if kind == "int8":
        return CpuKernels(num_threads=1).quantize_weight(torch.randn(num_out, num_in), kind)
    return replace(random_blocks(kind, num_out, num_in), x_bits=x_bits)


@sweep(isa=_ISAS, dtype=DTYPES, kind=["int8", *FORMATS], x_bits=[8, 16])
def test_blocks_and_int8(isa: str, dtype: torch.dtype, kind: str, x_bits: int) -> None:
    if kind == "int8" and x_bits == 16:
        pytest.skip("int8 takes activations of 8 bits")
    for num_out, num_in in ((70, 256), (33, 768)):
        weight = quantized(kind, num_out, num_in, x_bits)

        def make(kernels: CpuKernels, weight: QuantizedWeight = weight) -> list[Product]:
            layer = kernels.pack_quantized_linear([weight], None, dtype)
            return [layer, layer.fp32]

        assert_rows_alone(isa, make, rows_of(num_in, dtype))


@sweep(isa=_ISAS, dtype=DTYPES, codes=["int4", "fp4", "nf4", "int8", "e4m3"])
def test_codes(isa: str, dtype: torch.dtype, codes: str) -> None:
    for shape in ((70, 64, 16), (33, 136, 64), (96, 640, 640)):
        for extras in ({}, {"shifts": True, "out_scales": True}):
            weight = random_coded_weight(codes, shape, **extras)

            def make(kernels: CpuKernels, weight: object = weight) -> list[Product]:
                layer = kernels.pack_quantized_linear([weight], None, dtype)  # type: ignore[list-item]
                return [layer, layer.fp32]

            assert_rows_alone(isa, make, rows_of(shape[1], dtype))


HIDDEN, INNER, NUM_EXPERTS = 128, 160, 5
KINDS_OF_EXPERTS = [None, "int8", "q4_1", "q8_0", "coded"]


@sweep(isa=_ISAS, dtype=DTYPES, kind=KINDS_OF_EXPERTS)
def test_experts(isa: str, dtype: torch.dtype, kind: str | None) -> None:
    """Beside other tokens an expert has other numbers of rows, and tasks are cut otherwise."""
    shapes = [(2 * INNER, HIDDEN)] * NUM_EXPERTS, [(HIDDEN, INNER)] * NUM_EXPERTS
    sides: list[list[Any]] = [[made_for(kind, shape, dtype) for shape in side] for side in shapes]
    chosen = torch.stack([torch.randperm(NUM_EXPERTS)[:2] for _ in range(MOST)])
    weights = torch.rand(MOST, 2)
    x = rows_of(HIDDEN, dtype)
    expected: Tensor | None = None
    for num_threads in (1, 2):
        kernels = CpuKernels(isa=isa, num_threads=num_threads, exact_products=True)
        packed = [
            [
                kernels.pack_linear(one, None)
                if kind is None
                else kernels.pack_quantized_linear([one], None, dtype)
                for one in side
            ]
            for side in sides
        ]
        experts = kernels.pack_experts(*packed, Activation.SILU)
        if expected is None:
            rows = zip(x.split(1), chosen.split(1), weights.split(1), strict=True)
            expected = torch.cat([experts(*row) for row in rows])
        for count in COUNTS:
            found = experts(x[:count], chosen[:count], weights[:count])
            assert torch.equal(found, expected[:count]), count


def made_for(kind: str | None, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    if kind is None:
        return torch.randn(shape).to(dtype)
    if kind == "coded":
        return random_coded_weight("int4", (*shape, 32), shifts=True)
    return quantized(kind, *shape, 8 if kind == "int8" else 16)


@sweep(isa=_ISAS, dtype=DTYPES, wide=[False, True])
def test_low_rank(isa: str, dtype: torch.dtype, wide: bool) -> None:
    for num_in, widths, rank in ((150, (67, 300), 16), (64, (33, 1), 5)):
        parts = [(0, widths[0], rank), (widths[0], widths[1], rank)]
        added = [addition(num_in, parts, dtype) for _ in range(2)]
        x = rows_of(num_in, dtype)
        out = torch.randn(MOST, sum(widths)).to(torch.float32 if wide else dtype)
        slots = [row % 3 - 1 for row in range(MOST)]
        expected: Tensor | None = None
        for num_threads in (1, 2):
            layer = CpuKernels(isa=isa, num_threads=num_threads, exact_products=True).low_rank(
                num_in, sum(widths)
            )
            for slot, one in enumerate(added):
                layer.place(slot, one)
            if expected is None:
                expected = out.clone()
                for row in range(MOST):
                    layer.add(x[row : row + 1], expected[row : row + 1], adapter_rows([slots[row]]))
            for count in COUNTS:
                found = out[:count].clone()
                layer.add(x[:count], found, adapter_rows(slots[:count]))
                assert torch.equal(found, expected[:count]), count


@sweep(isa=_ISAS, dtype=DTYPES)
def test_heads(isa: str, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 70, 96).to(dtype)

    def make(kernels: CpuKernels) -> list[Product]:
        heads = kernels.pack_heads(weight)

        def multiply(x: Tensor) -> Tensor:
            out = torch.zeros(x.shape[0], 3, 70, dtype=dtype)
            heads(x.view(x.shape[0], 3, 96), out)
            return out

        return [multiply]

    assert_rows_alone(isa, make, rows_of(3 * 96, dtype))


def test_fast_products_are_a_choice() -> None:
    """Where a table has a kernel that rounds otherwise, many rows differ from one; and the choice
    can be taken back."""
    isa = _ISAS[-1]
    weight = quantized("q4_1", 70, 256, 16)
    x = rows_of(256, torch.bfloat16)
    kernels = CpuKernels(isa=isa, num_threads=1, exact_products=True)
    layer = kernels.pack_quantized_linear([weight], None, torch.bfloat16)
    exact = layer(x)
    kernels.set_exact_products(False)
    differs = not torch.equal(layer(x), exact)
    assert differs or not isa.startswith(("amx", "avx512_bf16"))
    kernels.set_exact_products(True)
    assert torch.equal(layer(x), exact)


def test_other_kernels_refuse_the_choice() -> None:
    for kernels in (TorchKernels(), ReferenceKernels()):
        kernels.set_exact_products(False)
        with pytest.raises(ConfigError, match="--cpu-products exact is a choice of the compiled"):
            kernels.set_exact_products(True)
