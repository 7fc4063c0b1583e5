"""Quantised weights: the formats, the reference against their definition, and every implementation
against the reference, on each instruction set that this machine has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.kernels.blocks import FORMATS
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.quantized import (
    KINDS,
    QuantizedWeight,
    grouped_by_kind,
    stacked,
)
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import multiply, quantize
from sapwood.kernels.torch_ops import TorchKernels
from tests.blocks import HALVES_AT, random_blocks
from tests.tiers import examples, sweep

REFERENCE = ReferenceKernels()
_ISAS = CpuKernels.usable_isas()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Of the largest entry of a result: the order of fp32 sums; sums that are equal but for it may be
rounded to neighbouring numbers of bfloat16, which are up to 2**-7 apart."""

every_kind = pytest.mark.parametrize("kind", KINDS)
every_isa = pytest.mark.parametrize("isa", _ISAS)
DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(11)
    return


def inputs(kind: str, count: int) -> int:
    """So many times 32 inputs, or whole blocks where those are larger."""
    return count * (FORMATS[kind].inputs if kind in FORMATS else 32)


def random_weight(kind: str, num_out: int, num_in: int) -> QuantizedWeight:
    """Any numbers that the format has, also those at its ends."""
    if kind == "int8":
        data = torch.randint(-127, 128, (num_out, num_in)).to(torch.int8)
        return QuantizedWeight(kind, (num_out, num_in), data, torch.rand(num_out) * 0.01)
    return random_blocks(kind, num_out, num_in)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    error = (actual.float() - expected.float()).abs().max().item() if actual.numel() else 0.0
    largest = max(1e-3, expected.float().abs().max().item()) if actual.numel() else 0.0
    assert error <= TOLERANCE[dtype] * largest


class TestFormats:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_blocks_are_read_as_the_gguf_library_reads_them(self, kind: str) -> None:
        weight = random_weight(kind, 7, inputs(kind, 3))
        numbers = gguf.dequantize(weight.data.numpy(), gguf.GGMLQuantizationType[kind.upper()])
        assert np.array_equal(weight.dequantized(torch.float32).numpy(), numbers)

    def test_int8_is_number_times_scale(self) -> None:
        data = torch.tensor([[-127, 0, 3], [1, 2, 127]], dtype=torch.int8)
        weight = QuantizedWeight("int8", (2, 3), data, torch.tensor([0.5, 2.0]))
        expected = torch.tensor([[-63.5, 0.0, 1.5], [2.0, 4.0, 254.0]])
        assert torch.equal(weight.dequantized(torch.float32), expected)

    @every_kind
    def test_large_weights_are_dequantised_piece_by_piece(self, kind: str) -> None:
        weight = random_weight(kind, 300, 256)
        whole = weight.dequantized(torch.bfloat16)
        rows = [weight.rows(i, 1).dequantized(torch.bfloat16) for i in range(300)]
        assert torch.equal(whole, torch.cat(rows))

    @every_kind
    def test_parts_of_a_weight(self, kind: str) -> None:
        step = inputs(kind, 1)
        weight = random_weight(kind, 9, 4 * step)
        whole = weight.dequantized(torch.float32)
        assert torch.equal(weight.rows(2, 5).dequantized(torch.float32), whole[2:7])
        columns = weight.columns(step, 2 * step).dequantized(torch.float32)
        assert torch.equal(columns, whole[:, step : 3 * step])
        padded = weight.rows(0, 9).with_rows(12).dequantized(torch.float32)
        assert torch.equal(padded[:9], whole)
        assert not padded[9:].any()
        nothing = weight.rows(9, 0).with_rows(3)
        assert not nothing.dequantized(torch.float32).any()

    @every_kind
    def test_stacking_keeps_the_outputs_in_order(self, kind: str) -> None:
        weights = [random_weight(kind, n, inputs(kind, 2)) for n in (3, 1, 4)]
        whole = torch.cat([weight.dequantized(torch.float32) for weight in weights])
        assert torch.equal(stacked(weights).dequantized(torch.float32), whole)
        assert stacked(weights).num_bytes == sum(weight.num_bytes for weight in weights)

    def test_neighbours_of_one_kind_are_stacked_and_others_not(self) -> None:
        kinds = ["q8_0", "q8_0", "q4_1", "q8_0"]
        weights = [random_weight(kind, 2, 32) for kind in kinds]
        groups = grouped_by_kind(weights)
        assert [group.kind for group in groups] == ["q8_0", "q4_1", "q8_0"]
        assert [group.shape[0] for group in groups] == [4, 2, 2]
        with pytest.raises(ValueError, match="different kinds"):
            stacked(weights)

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize(("first", "size"), [(16, 32), (0, 48)])
    def test_a_cut_through_a_block_is_refused(self, kind: str, first: int, size: int) -> None:
        with pytest.raises(ValueError, match=rf"inputs {first} to {first + size} cut a block"):
            random_weight(kind, 2, inputs(kind, 3)).columns(first, size)

    @pytest.mark.parametrize(
        ("kind", "shape", "data", "scales"),
        [
            ("int8", (2, 4), torch.zeros(2, 4, dtype=torch.int8), None),
            ("int8", (2, 4), torch.zeros(2, 4, dtype=torch.int8), torch.ones(3)),
            ("int8", (2, 4), torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2)),
            ("q8_0", (2, 48), torch.zeros(2, 51, dtype=torch.uint8), None),
            ("q4_1", (2, 32), torch.zeros(2, 18, dtype=torch.uint8), None),
            ("q4_0", (2, 32), torch.zeros(2, 18, dtype=torch.uint8), torch.ones(2)),
            ("q6_k", (2, 288), torch.zeros(2, 236, dtype=torch.uint8), None),
        ],
    )
    def test_what_does_not_fit_is_no_weight(
        self, kind: str, shape: tuple[int, int], data: Tensor, scales: Tensor | None
    ) -> None:
        with pytest.raises(ValueError, match=f"is no {kind} weight"):
            QuantizedWeight(kind, shape, data, scales)

    def test_kinds_that_nobody_knows(self) -> None:
        with pytest.raises(ValueError, match="'q9_k' but must be one of int8, q8_0, q4_0, q4_1"):
            QuantizedWeight("q9_k", (1, 32), torch.zeros(1, 22, dtype=torch.uint8))


class TestQuantizing:
    """The reference."""

    def test_int8_rows_use_the_whole_range(self) -> None:
        weight = torch.randn(20, 100)
        weight[3] = 0.0
        found = quantize(weight, "int8")
        assert found.scales is not None
        largest = found.data.abs().amax(1)
        assert largest.tolist() == [0 if i == 3 else 127 for i in range(20)]
        error = (found.dequantized(torch.float32) - weight).abs()
        assert (error <= found.scales[:, None] * 0.5001).all()

    def test_q8_0_is_within_half_a_step(self) -> None:
        weight = torch.randn(20, 96)
        weight[4, 32:64] = 0.0
        found = quantize(weight, "q8_0")
        _, scales, _ = found.unpacked()
        error = (found.dequantized(torch.float32) - weight).abs().view(20, 3, 32)
        # fp16 makes the scale up to 2**-11 smaller, of which there are 127.
        assert (error <= scales[:, :, None] * (0.5 + 127 * 2**-11)).all()
        assert not found.dequantized(torch.float32)[4, 32:64].any()

    def test_q4_1_is_better_than_the_range_cut_in_fifteen(self) -> None:
        weight = torch.randn(50, 320)
        error = (quantize(weight, "q4_1").dequantized(torch.float32) - weight).square().sum()
        blocks = weight.view(-1, 32)
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        step = (high - low) / 15
        plain = ((blocks - low) / step).round() * step + low
        assert error < 0.95 * (plain - blocks).square().sum()

    def test_q4_1_keeps_what_it_can_represent(self) -> None:
        levels = torch.arange(16.0).repeat(2) * 0.25 - 3.0
        weight = torch.stack((levels, levels.flip(0), torch.full((32,), 0.75), torch.zeros(32)))
        assert torch.equal(quantize(weight, "q4_1").dequantized(torch.float32), weight)

    @pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
    def test_blocks_need_whole_groups_of_inputs(self, kind: str) -> None:
        with pytest.raises(ValueError, match="has 33 inputs but blocks take a multiple of 32"):
            quantize(torch.zeros(2, 33), kind)

    def test_kinds_that_are_only_read(self) -> None:
        with pytest.raises(ValueError, match="to int8, q8_0 and q4_1, not to q4_0"):
            quantize(torch.zeros(2, 32), "q4_0")

    @pytest.mark.parametrize("kind", ["int8", "q8_0", "q4_1"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_weights_that_are_no_numbers_show(self, kind: str, bad: float) -> None:
        weight = torch.randn(3, 64)
        weight[1, 40] = bad
        outputs = multiply(torch.randn(2, 64), quantize(weight, kind))
        assert not outputs[:, 1].isfinite().any()
        assert outputs[:, [0, 2]].isfinite().all()

    def test_blocks_beyond_the_range_of_fp16_stay_finite(self) -> None:
        weight = torch.linspace(-1e6, 1e6, 32)[None]
        found = quantize(weight, "q4_1").dequantized(torch.float32)
        assert found.isfinite().all()


def by_definition(x: list[float], weight: QuantizedWeight, output: int) -> float:
    """One product as kernels/quantized.py describes it, number by number."""
    size = 64 if weight.kind == "int8" else 32
    of_blocks: list[float] = []
    if weight.kind != "int8":
        kind = gguf.GGMLQuantizationType[weight.kind.upper()]
        of_blocks = gguf.dequantize(weight.data[output].numpy(), kind).tolist()
    total = 0.0
    for first in range(0, len(x), size):
        group = x[first : first + size]
        largest = max(abs(value) for value in group)
        inverse = 0.0 if largest < 1e-30 else float(np.float32(127) / np.float32(largest))
        rounded = [int(np.rint(np.float32(value) * np.float32(inverse))) for value in group]
        scale = largest / 127
        if weight.kind == "int8":
            assert weight.scales is not None
            numbers = weight.data[output, first : first + size].tolist()
            dot = sum(a * b for a, b in zip(rounded, numbers, strict=True))
            total += dot * scale * weight.scales[output].item()
            continue
        values = of_blocks[first : first + size]
        total += scale * sum(a * b for a, b in zip(rounded, values, strict=True))
    return total


@every_kind
def test_the_reference_is_the_definition(kind: str) -> None:
    num_in = 160 if kind == "int8" else inputs(kind, 3)  # int8: a last group that is not full
    weight = random_weight(kind, 5, num_in)
    x = torch.randn(3, num_in) * torch.tensor([[1.0], [1e-3], [300.0]])
    x[0, 64:] = 0.0
    expected = [[by_definition(row, weight, i) for i in range(5)] for row in x.tolist()]
    torch.testing.assert_close(multiply(x, weight), torch.tensor(expected), rtol=1e-4, atol=1e-6)


@every_kind
@every_dtype
def test_rounding_x_costs_little(kind: str, dtype: torch.dtype) -> None:
    """The error beside exact products of the same weights, in units of the results' spread."""
    weight = random_weight(kind, 64, 512)
    x = torch.randn(16, 512).to(dtype)
    exact = x.float() @ weight.dequantized(torch.float32).T
    error = multiply(x, weight) - exact
    assert error.std() <= 0.01 * exact.std()


class TestTorchKernels:
    @every_dtype
    def test_layers_are_dense_ones_of_the_dequantised_weights(self, dtype: torch.dtype) -> None:
        parts = [random_weight("q4_1", 5, 64), random_weight("q8_0", 3, 64)]
        bias = torch.randn(8).to(dtype)
        layer = TorchKernels().pack_quantized_linear(parts, bias, dtype)
        x = torch.randn(4, 64).to(dtype)
        weight = torch.cat([part.dequantized(dtype) for part in parts])
        assert_close(layer(x), F.linear(x, weight, bias), dtype)
        assert not TorchKernels.multiplies_quantized


def layer_pair(
    kernels: CpuKernels, parts: list[QuantizedWeight], bias: Tensor | None, dtype: torch.dtype
) -> tuple[object, object]:
    return (
        kernels.pack_quantized_linear(parts, bias, dtype),
        REFERENCE.pack_quantized_linear(parts, bias, dtype),
    )


def most_rounded_rows(isa: str) -> int:
    """x is rounded up to so many rows; the unit of AMX takes more rows as they are."""
    return 32 if isa.startswith("amx") else 50


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[str, int]], int, int, bool]:
    """(kind, outputs) of each part, inputs, rows, whether there is a bias."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    parts = [(kind, draw(st.integers(1, 130))) for kind in kinds]
    step = max(FORMATS[kind].inputs if kind in FORMATS else 1 for kind in kinds)
    num_in = step * draw(st.integers(1, {1: 200, 32: 9, 256: 2}[step]))
    return parts, num_in, draw(st.integers(0, 45)), draw(st.booleans())


@pytest.mark.skipif(not _ISAS, reason="the native kernels are not built")
class TestNative:
    @every_isa
    @every_dtype
    @settings(
        max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(case=cases(), num_threads=st.sampled_from([1, 2, 3]))
    def test_any_shape_equals_the_reference(
        self,
        isa: str,
        dtype: torch.dtype,
        case: tuple[list[tuple[str, int]], int, int, bool],
        num_threads: int,
    ) -> None:
        torch.manual_seed(0)
        sizes, num_in, rows, has_bias = case
        rows = min(rows, most_rounded_rows(isa))
        kernels = CpuKernels(isa=isa, num_threads=num_threads)
        parts = [random_weight(kind, num_out, num_in) for kind, num_out in sizes]
        num_out = sum(size for _, size in sizes)
        bias = torch.randn(num_out).to(dtype) if has_bias else None
        layer, reference = layer_pair(kernels, parts, bias, dtype)
        x = torch.randn(rows, num_in).to(dtype)
        assert layer(x).dtype == dtype
        assert_close(layer(x), reference(x), dtype)
        wide = layer.fp32(x)
        assert wide.dtype == torch.float32
        assert_close(wide, reference.fp32(x), dtype if has_bias else torch.float32)

    @every_kind
    @pytest.mark.parametrize("shape", [(1, 1536, 576), (13, 576, 960), (70, 96, 500)])
    def test_shapes_of_models(self, kind: str, shape: tuple[int, int, int]) -> None:
        """Several tasks per thread, rows cut between tasks, and rows that threads share."""
        rows, num_in, num_out = shape
        num_in = max(1, num_in // inputs(kind, 1)) * inputs(kind, 1)
        parts = [random_weight(kind, num_out, num_in)]
        x = torch.randn(rows, num_in) * (torch.rand(rows, 1) * 10)
        expected = REFERENCE.pack_quantized_linear(parts, None, torch.float32)(x)
        for isa in _ISAS:
            kernels = CpuKernels(isa=isa, num_threads=2)
            layer = kernels.pack_quantized_linear(parts, None, torch.float32)
            assert_close(layer(x), expected, torch.float32)

    @every_isa
    @every_kind
    def test_a_row_depends_on_itself_alone(self, isa: str, kind: str) -> None:
        """Not on the rows beside it, nor on the number of threads: bit by bit."""
        num_in = max(192, inputs(kind, 1))
        parts = [random_weight(kind, 333, num_in), random_weight("int8", 40, num_in)]
        x = torch.randn(most_rounded_rows(isa), num_in).to(torch.bfloat16)
        results = []
        for num_threads in (1, 2):
            kernels = CpuKernels(isa=isa, num_threads=num_threads)
            layer = kernels.pack_quantized_linear(parts, None, torch.bfloat16)
            results.append(layer(x))
            results.append(torch.cat([layer(row[None]) for row in x]))
            results.append(torch.cat([layer(piece) for piece in x.split(13)]))
        for one, other in pairwise(results):
            assert torch.equal(one, other)

    @every_kind
    def test_instruction_sets_with_fused_products_agree_bit_by_bit(self, kind: str) -> None:
        num_in = max(224, inputs(kind, 1))
        parts = [random_weight(kind, 70, num_in)]
        x = torch.randn(9, num_in)
        results = [
            CpuKernels(isa=isa, num_threads=1).pack_quantized_linear(parts, None, torch.float32)(x)
            for isa in _ISAS
            if isa != "generic"
        ]
        if len(results) < 2:
            pytest.skip(f"this machine has only {_ISAS}")
        for one, other in pairwise(results):
            assert torch.equal(one, other)

    @every_isa
    def test_rows_may_lie_apart_and_columns_too(self, isa: str) -> None:
        kernels = CpuKernels(isa=isa, num_threads=2)
        layer = kernels.pack_quantized_linear([random_weight("q4_0", 33, 64)], None, torch.float32)
        wide = torch.randn(5, 200)
        apart, transposed = wide[:, 7:71], torch.randn(64, 5).T
        assert torch.equal(layer(apart), layer(apart.contiguous()))
        assert torch.equal(layer(transposed), layer(transposed.contiguous()))

    @sweep(kind=KINDS, dtype=DTYPES, bad=[math.nan, math.inf, -math.inf])
    def test_what_is_no_number_shows_in_its_row_only(
        self, kind: str, dtype: torch.dtype, bad: float
    ) -> None:
        num_in = max(96, inputs(kind, 1))
        parts, x = [random_weight(kind, 50, num_in)], torch.randn(20, num_in).to(dtype)
        broken = x.clone()
        broken[7, 70] = bad
        others = torch.arange(20) != 7
        assert REFERENCE.pack_quantized_linear(parts, None, dtype)(broken[7:8]).isnan().all()
        for isa in _ISAS:
            kernels = CpuKernels(isa=isa, num_threads=2)
            layer = kernels.pack_quantized_linear(parts, None, dtype)
            found = layer(broken)
            assert found[7].isnan().all()
            assert torch.equal(found[others], layer(x)[others])

    @sweep(isa=_ISAS, kind=KINDS, size=[0.0, 1e-38, 9e-31, 2e-30, 1e-20, 1e30])
    def test_tiny_and_huge_activations(self, isa: str, kind: str, size: float) -> None:
        num_in = max(64, inputs(kind, 1))
        parts, bias = [random_weight(kind, 40, num_in)], torch.randn(40)
        x = torch.rand(3, num_in) * size
        x[:, 0] = size
        layer, reference = layer_pair(
            CpuKernels(isa=isa, num_threads=1), parts, bias, torch.float32
        )
        expected = reference(x)
        assert expected.isfinite().all()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        if size < 1e-30:
            assert torch.equal(layer(x), bias.expand(3, 40))

    @sweep(
        isa=_ISAS,
        kind=list(FORMATS),
        half=[0x0001, 0x83FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7E01],
    )
    def test_every_kind_of_scale(self, isa: str, kind: str, half: int) -> None:
        """Subnormal, the smallest normal, the largest, infinite, NaN."""
        weight = random_weight(kind, 40, max(64, inputs(kind, 1)))
        at = HALVES_AT.get(kind, (0,))[0]
        weight.data[3, at : at + 2] = torch.tensor([half & 255, half >> 8])
        x = torch.randn(4, weight.shape[1])
        kernels = CpuKernels(isa=isa, num_threads=1)
        layer, reference = layer_pair(kernels, [weight], None, torch.float32)
        expected = reference(x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert expected[:, 3].isfinite().all() == (half & 0x7C00 != 0x7C00)

    @every_isa
    def test_ends_of_the_range_do_not_saturate(self, isa: str) -> None:
        """The largest products of bytes in a row: 16-bit sums of them would overflow."""
        data = torch.full((32, 256), 127, dtype=torch.int8)
        data[::2] = -127
        weight = QuantizedWeight("int8", (32, 256), data, torch.ones(32))
        layer = CpuKernels(isa=isa, num_threads=1).pack_quantized_linear(
            [weight], None, torch.float32
        )
        result = layer(torch.full((2, 256), -127.0))
        assert result[:, 1].tolist() == [-127.0 * 127 * 256] * 2
        assert result[:, 0].tolist() == [127.0 * 127 * 256] * 2

    @sweep(
        isa=_ISAS,
        dtype=DTYPES,
        kind=["int8", "q8_0"],
        shape=[(1, 32), (37, 96), (300, 160), (0, 64)],
    )
    def test_quantising_gives_the_reference_bit_by_bit(
        self, isa: str, dtype: torch.dtype, kind: str, shape: tuple[int, int]
    ) -> None:
        weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
        if shape[0] > 1:
            weight[0], weight[1] = 0.0, 1e-9
        found = CpuKernels(isa=isa, num_threads=2).quantize_weight(weight, kind)
        expected = quantize(weight, kind)
        assert torch.equal(found.data, expected.data)
        if expected.scales is not None:
            assert found.scales is not None
            assert torch.equal(found.scales, expected.scales)

    @every_isa
    @every_dtype
    def test_quantising_to_4_bits_is_as_good_as_the_reference(
        self, isa: str, dtype: torch.dtype
    ) -> None:
        weight = (torch.randn(61, 320) * torch.rand(61, 1)).to(dtype)
        weight[5, :32], weight[6, 32:64] = 0.0, 0.25
        found = CpuKernels(isa=isa, num_threads=2).quantize_weight(weight, "q4_1")
        expected = quantize(weight, "q4_1")
        errors = [
            (one.dequantized(torch.float32) - weight.float()).square().sum()
            for one in (found, expected)
        ]
        assert errors[0] <= errors[1] * 1.001
        assert (found.data == expected.data).float().mean() > 0.99
        whole = found.dequantized(torch.float32)
        assert torch.equal(whole[5, :32], torch.zeros(32))
        assert torch.equal(whole[6, 32:64], torch.full((32,), 0.25))

    @sweep(isa=_ISAS, kind=["int8", "q8_0", "q4_1"], bad=[math.nan, math.inf, -math.inf])
    def test_weights_that_are_no_numbers_show(self, isa: str, kind: str, bad: float) -> None:
        weight = torch.randn(3, 64)
        weight[1, 40] = bad
        kernels = CpuKernels(isa=isa, num_threads=1)
        layer = kernels.pack_quantized_linear(
            [kernels.quantize_weight(weight, kind)], None, torch.float32
        )
        outputs = layer(torch.randn(2, 64))
        assert not outputs[:, 1].isfinite().any()
        assert outputs[:, [0, 2]].isfinite().all()

    def test_weights_of_other_dtypes_and_layouts(self) -> None:
        kernels = CpuKernels(num_threads=1)
        weight = torch.randn(64, 37)
        for kind in ("int8", "q8_0", "q4_1"):
            transposed = kernels.quantize_weight(weight.T, kind)
            assert torch.equal(
                transposed.data, kernels.quantize_weight(weight.T.contiguous(), kind).data
            )
            half = kernels.quantize_weight(weight.T.half(), kind)
            assert torch.equal(half.data, quantize(weight.T.half(), kind).data)
        with pytest.raises(ValueError, match="multiple of 32"):
            kernels.quantize_weight(weight, "q4_1")
        with pytest.raises(ValueError, match="not to q4_0"):
            kernels.quantize_weight(weight.T, "q4_0")

    def test_what_does_not_fit_is_refused(self) -> None:
        kernels = CpuKernels(num_threads=1)
        one, other = random_weight("int8", 4, 64), random_weight("q8_0", 4, 32)
        with pytest.raises(ValueError, match=r"different inputs: \[32, 64\]"):
            kernels.pack_quantized_linear([one, other], None, torch.float32)
        for bias in (torch.zeros(3), torch.zeros(4, dtype=torch.bfloat16)):
            with pytest.raises(ValueError, match=r"bias must be \[4\] of torch.float32"):
                kernels.pack_quantized_linear([one], bias, torch.float32)
        with pytest.raises(TypeError, match=r"torch.float16 is neither float32 nor bfloat16"):
            kernels.pack_quantized_linear([one], None, torch.float16)
        layer = kernels.pack_quantized_linear([one], None, torch.float32)
        for x in (torch.zeros(2, 63), torch.zeros(2, 64, dtype=torch.bfloat16)):
            with pytest.raises(ValueError, match=r"does not fit a quantised weight \[4, 64\]"):
                layer(x)
