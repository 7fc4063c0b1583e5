"""The matrix unit of Intel processors (AMX): natively where there is one, and emulated.

The emulation replaces the unit's instructions only (csrc/matrix.h): tiles, their shapes, and what
is left over at the edges are the same code. Attention on it is in test_cpu_kernels.py, with all
instruction sets.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.kernels.coded import CODES
from sapwood.kernels.cpu import CpuKernels
from tests.kernels.test_coded import random_weight as random_coded_weight
from tests.kernels.test_quantized import KINDS
from tests.kernels.test_quantized import random_weight as random_group_weight

_ISAS = [isa for isa in CpuKernels.usable_isas() if isa.startswith("amx")]

pytestmark = pytest.mark.skipif(
    not _ISAS, reason="no AVX-512 BF16, on which the matrix unit builds"
)

_ROWS = [1, 4, 5, 15, 16, 17, 31, 32, 33, 40, 64, 129, 300]


@pytest.fixture(params=_ISAS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels(isa=request.param, num_threads=2)


@pytest.fixture(params=[True, False], ids=["exact", "fast"])
def both_kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """With products of either kind, of the last of the sets."""
    return CpuKernels(isa=_ISAS[-1], num_threads=2, exact_products=request.param)


@pytest.mark.parametrize("inputs", [6, 31, 32, 40, 96, 800, 1600])
@pytest.mark.parametrize("outputs", [1, 33, 288])
def test_dense_products(kernels: CpuKernels, inputs: int, outputs: int) -> None:
    torch.manual_seed(inputs)
    weight = torch.randn(outputs, inputs).bfloat16()
    layer = kernels.pack_linear(weight, None)
    for rows in _ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        expected = x.double() @ weight.double().T
        error = (layer.fp32(x).double() - expected).abs().max().item()
        # fp32 sums of exact products
        assert error <= 2e-6 * inputs**0.5 * expected.abs().max().item(), rows


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_of_numbers(both_kernels: CpuKernels, kind: str) -> None:
    """x is not rounded, weights are bf16; or x is, and weights are exact. 1,792 inputs are cut amid
    a block of 256."""
    for num_out, num_in in ((70, 256), (33, 1792)):
        weight = random_group_weight(kind, num_out, num_in)
        layer = both_kernels.pack_quantized_linear([weight], None, torch.bfloat16)
        rows = (129, 200, 300) if kind == "int8" else (33, 100, 300)
        # Exact products of these round x to 8 bits, for many rows as for one.
        roundings = 3.0 if both_kernels._context.exact_products else 2.0
        check_many_rows(layer, weight.dequantized(torch.float32), rows=rows, roundings=roundings)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("shape", [(70, 64, 16), (33, 136, 64), (96, 1600, 1600), (40, 1632, 24)])
def test_many_rows_of_codes(
    both_kernels: CpuKernels, codes: str, shape: tuple[int, int, int]
) -> None:
    for extras in ({}, {"shifts": True, "out_scales": True}):
        weight = random_coded_weight(codes, shape, **extras)
        layer = both_kernels.pack_quantized_linear([weight], None, torch.bfloat16)
        check_many_rows(layer, weight.dequantized(torch.float32), rows=(7, 33, 300))


def test_sums_of_many_rows_wait_for_the_next_inputs() -> None:
    """As many rows and outputs as one task takes, of inputs that are cut: 2,048 are two blocks."""
    kernels = CpuKernels(isa=_ISAS[-1], num_threads=1)
    weight = random_coded_weight("int4", (1280, 2048, 64))
    layer = kernels.pack_quantized_linear([weight], None, torch.bfloat16)
    check_many_rows(layer, weight.dequantized(torch.float32), rows=(512,))


def check_many_rows(
    layer: Any, weight: Tensor, rows: tuple[int, ...], *, roundings: float = 2.0
) -> None:
    """Within so many roundings of the exact product, and no row depends on the others."""
    x = torch.randn(max(rows), weight.shape[1]).bfloat16()
    expected = x.double() @ weight.double().T
    limit = roundings * 2**-8 * expected.abs().max().item()
    whole = layer(x)
    for count in rows:
        assert torch.equal(layer(x[:count]), whole[:count])
    assert (whole.double() - expected).abs().max().item() <= limit
    assert not layer(torch.zeros_like(x)).any()


@pytest.mark.parametrize("inputs", [64, 100, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_bytes_are_those_of_vectors(
    kernels: CpuKernels, inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(inputs)
    vectors = CpuKernels(isa="avx512_bf16", num_threads=1)
    weight = kernels.quantize_weight(torch.randn(70, inputs), "int8")
    layer = kernels.pack_quantized_linear([weight], None, dtype)
    plain = vectors.pack_quantized_linear([weight], None, dtype)
    for rows in _ROWS if dtype == torch.float32 else [rows for rows in _ROWS if rows <= 128]:
        x = torch.randn(rows, inputs).to(dtype)
        assert torch.equal(layer(x), plain(x)), rows
