"""Coded weights: the reference against their definition, and the C++ kernels against the reference
on each instruction set that this machine has."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.kernels.coded import (
    CODES,
    CodedWeight,
    neighbours_stacked,
    quantize_codes,
)
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import quantize
from sapwood.kernels.torch_ops import TorchKernels
from tests.tiers import sweep

ISAS = CpuKernels.usable_isas()
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(33, 64, 16), (96, 96, 32), (70, 100, 100), (200, 136, 64), (5, 20, 20)]
"""Outputs, inputs, group: whole and broken panels, groups of one size, a shorter one, a single."""
LIMIT = {FP32: 1e-5, BF16: 2**-8}
"""Of a result's largest entry: the order of fp32 sums, and one rounding of the result (of nf4's
values, too)."""

every_codes = pytest.mark.parametrize("codes", CODES)


def random_weight(
    codes: str, shape: tuple[int, int, int], *, shifts: bool = False, order: bool = False,
    out_scales: bool = False, seed: int = 0,
) -> CodedWeight:  # fmt: skip
    """Any codes that there are, those of subnormal numbers among them."""
    num_out, num_in, group = shape
    torch.manual_seed(seed)
    width = num_in if codes in ("int8", "e4m3") else -(-num_in // 2)
    data = torch.randint(0, 256, (num_out, width)).to(torch.uint8)
    if codes == "e4m3":
        data[(data & 127) == 127] = 3
    per_group = (num_out, -(-num_in // group))
    return CodedWeight(
        codes,
        (num_out, num_in),
        data,
        torch.rand(per_group) * 0.01 + 0.001,
        group,
        torch.randint(-8, 9, per_group).float() if shifts else None,
        torch.rand(num_out) if out_scales else None,
        torch.randperm(num_in).int() if order else None,
    )


def pack(kernels: Any, parts: list[Any], dtype: torch.dtype, bias: Tensor | None = None) -> Any:
    layer: PackedLinear = kernels.pack_quantized_linear(parts, bias, dtype)
    return layer


def exact(x: Tensor, weight: CodedWeight) -> Tensor:
    return x.double() @ weight.dequantized(FP32).double().T


def assert_close(found: Tensor, expected: Tensor, limit: float) -> None:
    error = (found.double() - expected).abs().max().item()
    assert error <= limit * expected.abs().max().item()


def test_a_weight_is_value_plus_shift_times_scales() -> None:
    weight = CodedWeight(
        "int4", (1, 8), torch.tensor([[0x10, 0x32, 0x54, 0xF8]], dtype=torch.uint8),
        torch.tensor([[2.0]]), 8, torch.tensor([[1.0]]), torch.tensor([10.0]),
        torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.int32),
    )  # fmt: skip
    values = [-8.0, -7, -6, -5, -4, -3, 0, 7]
    expected = [(value + 1) * 20 for value in reversed(values)]
    assert weight.dequantized(FP32).tolist() == [expected]


@sweep(isa=ISAS, codes=CODES, shape=SHAPES)
def test_products_are_those_of_the_weights(
    isa: str, codes: str, shape: tuple[int, int, int]
) -> None:
    kernels = CpuKernels(num_threads=2, isa=isa)
    for extras in ({}, {"shifts": True, "out_scales": True}, {"shifts": True, "order": True}):
        weight = random_weight(codes, shape, **extras)
        for dtype in (FP32, BF16):
            layer = pack(kernels, [weight], dtype)
            x = torch.randn(40, shape[1]).to(dtype)
            wide = layer.fp32(x)
            # The unit of AMX, which serves from seven rows on, takes weights as bf16.
            has_unit = isa.startswith("amx") and dtype == BF16
            is_rounded = (codes == "nf4" or has_unit) and dtype == BF16
            assert_close(wide, exact(x, weight), 2**-8 if is_rounded else 2e-5)
            assert torch.equal(layer(x), wide.to(dtype))
            few = layer.fp32(x[:6]) if has_unit else wide
            assert_close(few, exact(x[: len(few)], weight), 2**-8 if codes == "nf4" else 2e-5)
            for rows in (1, 2, 3, 6):  # in registers
                assert torch.equal(layer.fp32(x[:rows]), few[:rows])
            for rows in (7, 13):  # with decoded panels
                assert torch.equal(layer.fp32(x[:rows]), wide[:rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_results(threads: int) -> None:
    weight = random_weight("int4", (700, 256, 64), shifts=True)
    layers = [
        pack(CpuKernels(num_threads=count), [weight], BF16) for count in (1, threads)
    ]  # fmt: skip
    for rows in (1, 5, 100):
        x = torch.randn(rows, 256).bfloat16()
        assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("kernels", [CpuKernels, ReferenceKernels, TorchKernels])
def test_parts_of_all_layouts_follow_each_other(kernels: Any) -> None:
    plain = random_weight("int4", (40, 64, 32))
    parts = [
        plain,
        random_weight("int4", (24, 64, 32), seed=1),
        random_weight("e4m3", (8, 64, 64)),
        quantize(torch.randn(16, 64) * 0.1, "int8"),
        random_weight("int8", (9, 64, 32), shifts=True, order=True),
    ]
    bias, x = torch.randn(97), torch.randn(3, 64)
    found = pack(kernels(), parts, FP32, bias)(x)
    whole = torch.cat([part.dequantized(FP32) for part in parts])
    assert_close(found, (x @ whole.T + bias).double(), 0.01)  # one part rounds x
    exact_part = slice(0, 72)
    assert_close(found[:, exact_part], (x @ whole.T + bias)[:, exact_part].double(), 1e-5)


def test_neighbours_of_one_layout_are_stacked_and_others_not() -> None:
    one = random_weight("int4", (4, 64, 32))
    same, shifted = (
        random_weight("int4", (3, 64, 32)),
        random_weight("int4", (3, 64, 32), shifts=True),
    )
    ordered = [random_weight("int4", (2, 64, 32), order=True, seed=seed) for seed in (1, 1, 2)]
    found = neighbours_stacked([one, same, shifted, *ordered])
    assert [part.shape[0] for part in found] == [7, 3, 4, 2]
    whole = torch.cat([one.dequantized(FP32), same.dequantized(FP32)])
    assert torch.equal(found[0].dequantized(FP32), whole)


@every_codes
def test_parts_of_a_weight(codes: str) -> None:
    weight = random_weight(codes, (9, 128, 32), shifts=True, out_scales=True)
    whole = weight.dequantized(FP32)
    assert torch.equal(weight.rows(2, 5).dequantized(FP32), whole[2:7])
    assert torch.equal(weight.columns(32, 64).dequantized(FP32), whole[:, 32:96])
    # Inputs that cut a group of 32, one of them to the end.
    for first, size in ((16, 64), (8, 24), (104, 24)):
        part = weight.columns(first, size)
        assert part.scales.shape[1] == -(-size // part.group_inputs)
        assert torch.equal(part.dequantized(FP32), whole[:, first : first + size])
    padded = weight.with_rows(12).dequantized(FP32)
    assert torch.equal(padded[:9], whole)
    assert not padded[9:].any()


def test_cuts_that_cannot_be() -> None:
    weight = random_weight("int4", (4, 128, 32))
    with pytest.raises(ValueError, match=r"inputs 12 to 60 cannot be cut out .* groups of 32"):
        weight.columns(12, 48)
    ordered = random_weight("int4", (4, 128, 32), order=True)
    with pytest.raises(ValueError, match="in an order of their own"):
        ordered.columns(0, 64)
    assert ordered.columns(0, 128) is ordered


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codes": "int3"}, "'int3' but must be one of int4, fp4"),
        ({"group_inputs": 20}, "groups of 20 inputs: they must be a multiple of 8"),
        ({"data": torch.zeros(4, 63, dtype=torch.uint8)}, r"data of a int4 weight \[4, 128\]"),
        ({"scales": torch.ones(4, 3)}, r"scales .* must be torch.float32 \[4, 4\]"),
        ({"shifts": torch.ones(4, 4).half()}, "shifts .* not torch.float16"),
        ({"order": torch.arange(128)}, "order .* not torch.int64"),
    ],
)
def test_what_does_not_fit_is_no_weight(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(random_weight("int4", (4, 128, 32)), **fields)


@pytest.mark.parametrize(("codes", "step"), [("e4m3", 2**-4), ("int8", 0.5 / 127)])
@pytest.mark.parametrize("group", [None, 32])
def test_quantising_is_within_half_a_step(codes: str, step: float, group: int | None) -> None:
    """Of each weight (E4M3 has a mantissa of 3 bits) or of its group's largest."""
    weight = torch.randn(70, 96)
    weight[3] = 0.0
    found = quantize_codes(weight, codes, group).dequantized(FP32)
    blocks = weight.view(70, -1, group or 96)
    largest = blocks.abs().amax(2, keepdim=True)
    of_each = blocks.abs() + largest * 2**-9 if codes == "e4m3" else largest
    assert ((found.view_as(blocks) - blocks).abs() <= step * 1.001 * of_each).all()


@pytest.mark.parametrize("codes", ["e4m3", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_show(codes: str, bad: float) -> None:
    weight = torch.randn(3, 64)
    weight[1, 40] = bad
    outputs = pack(CpuKernels(), [quantize_codes(weight, codes)], BF16)(
        torch.randn(2, 64).bfloat16()
    )
    assert not outputs[:, 1].isfinite().any()
    assert outputs[:, [0, 2]].isfinite().all()


def test_a_nan_among_e4m3_codes_shows_in_its_output_alone() -> None:
    weight = random_weight("e4m3", (40, 64, 64))
    weight.data[7, 5] = 0xFF
    for kernels in (CpuKernels(), ReferenceKernels()):
        outputs = pack(kernels, [weight], FP32)(torch.randn(2, 64))
        assert outputs.isnan().any(0).nonzero().flatten().tolist() == [7]


def test_x_must_fit() -> None:
    layer = pack(CpuKernels(), [random_weight("int4", (4, 64, 32))], BF16)
    with pytest.raises(ValueError, match=r"x \[2, 32\] .* does not fit .* \[4, 64\]"):
        layer(torch.zeros(2, 32).bfloat16())
    x = torch.randn(64, 3).bfloat16()
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))
