"""Products of blocks with activations in 16 bits: two digits of bytes, or decoded weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.kernels.blocks import FORMATS
from sapwood.kernels.coded import neighbours_stacked
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.quantized import QuantizedWeight, grouped_by_kind, stacked
from sapwood.kernels.reference.quantized import multiply
from tests.blocks import random_blocks
from tests.tiers import examples, sweep

_ISAS = CpuKernels.usable_isas()
DTYPES = [torch.float32, torch.bfloat16]
LARGEST_ERROR = {torch.float32: 2e-4, torch.bfloat16: 2**-7}
"""Of the largest sum of magnitudes. A result in bfloat16 may be rounded to the neighbour of the
nearest number, and matrix units round weights to bfloat16 too."""


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(7)
    return


def fine(kind: str, num_out: int, num_in: int) -> QuantizedWeight:
    return replace(random_blocks(kind, num_out, num_in), x_bits=16)


def exact(x: Tensor, parts: list[QuantizedWeight], bias: Tensor | None = None) -> Tensor:
    weight = torch.cat([part.dequantized(torch.float32) for part in parts]).double()
    out = x.double() @ weight.T
    return out if bias is None else out + bias.double()


def assert_close(
    actual: Tensor, x: Tensor, parts: list[QuantizedWeight], bias: Tensor | None = None
) -> None:
    """Beside exact products, in units of the largest sum of magnitudes."""
    expected = exact(x, parts, bias)
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    weight = torch.cat([part.dequantized(torch.float32) for part in parts])
    magnitude = (x.double().abs() @ weight.double().abs().T).max().item()
    if bias is not None:
        magnitude += bias.abs().max().item()
    error = (actual.double() - expected).abs().max().item()
    assert error <= LARGEST_ERROR[x.dtype] * magnitude


def inputs(kind: str, count: int) -> int:
    return count * FORMATS[kind].inputs


@pytest.mark.parametrize("kind", FORMATS)
def test_the_reference_loses_next_to_nothing(kind: str) -> None:
    weight = fine(kind, 16, inputs(kind, 3))
    x = torch.randn(4, weight.shape[1])
    expected = exact(x, [weight])
    of_16_bits = (multiply(x, weight) - expected).std()
    of_8_bits = (multiply(x, replace(weight, x_bits=8)) - expected).std()
    assert of_16_bits <= 1e-4 * expected.std()
    assert of_8_bits > 50 * of_16_bits


def test_weights_of_other_x_bits_are_not_stacked() -> None:
    parts = [random_blocks("q4_1", 5, 64), fine("q4_1", 7, 64), fine("q4_1", 3, 64)]
    assert [part.shape[0] for part in grouped_by_kind(parts)] == [5, 10]
    assert [
        part.x_bits for part in neighbours_stacked(parts) if isinstance(part, QuantizedWeight)
    ] == [8, 16]
    with pytest.raises(ValueError, match="cannot be stacked"):
        stacked(parts)


def test_int8_weights_take_x_of_8_bits_only() -> None:
    data, scales = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match="int8 weights have no x of 16 bits"):
        QuantizedWeight("int8", (4, 64), data, scales, x_bits=16)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[str, int]], int, int, bool]:
    """(kind, outputs) of each part, inputs, rows, whether there is a bias."""
    kinds = draw(st.lists(st.sampled_from(list(FORMATS)), min_size=1, max_size=3))
    parts = [(kind, draw(st.integers(1, 130))) for kind in kinds]
    step = max(FORMATS[kind].inputs for kind in kinds)
    num_in = step * draw(st.integers(1, {32: 30, 256: 4}[step]))
    return parts, num_in, draw(st.integers(0, 80)), draw(st.booleans())


@pytest.mark.skipif(not _ISAS, reason="the native kernels are not built")
class TestNative:
    @pytest.mark.parametrize("isa", _ISAS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
    @settings(
        max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(case=cases(), num_threads=st.sampled_from([1, 2, 3]))
    def test_any_shape(
        self,
        isa: str,
        dtype: torch.dtype,
        case: tuple[list[tuple[str, int]], int, int, bool],
        num_threads: int,
    ) -> None:
        torch.manual_seed(0)
        sizes, num_in, rows, has_bias = case
        kernels = CpuKernels(isa=isa, num_threads=num_threads)
        parts = [fine(kind, num_out, num_in) for kind, num_out in sizes]
        num_out = sum(size for _, size in sizes)
        bias = torch.randn(num_out).to(dtype) if has_bias else None
        layer = kernels.pack_quantized_linear(parts, bias, dtype)
        x = torch.randn(rows, num_in).to(dtype)
        assert_close(layer(x), x, parts, bias)
        assert layer.fp32(x).dtype == torch.float32
        assert_close(layer.fp32(x), x, parts, bias)

    @sweep(
        isa=_ISAS, kind=list(FORMATS), rows=[1, 2, 3, 7, 8, 9, 12, 13, 17, 25, 33, 150],
        exact=[True, False],
    )  # fmt: skip
    def test_any_number_of_rows(self, isa: str, kind: str, rows: int, exact: bool) -> None:
        """On both sides of the numbers from which fast products decode weights."""
        weight = fine(kind, 333, inputs(kind, 2))
        x = torch.randn(rows, weight.shape[1]) * (torch.rand(rows, 1) * 10)
        for dtype in DTYPES:
            kernels = CpuKernels(isa=isa, num_threads=2, exact_products=exact)
            layer = kernels.pack_quantized_linear([weight], None, dtype)
            narrow = x.to(dtype)
            assert_close(layer(narrow), narrow, [weight])

    @sweep(isa=_ISAS, kind=["q8_0", "q4_1", "q6_k"])
    def test_parts_with_fewer_bits(self, isa: str, kind: str) -> None:
        num_in = 256
        parts = [
            fine(kind, 40, num_in),
            random_blocks("q4_0", 33, num_in),
            fine("q5_1", 31, num_in),
        ]
        kernels = CpuKernels(isa=isa, num_threads=2)
        for rows in (2, 40):
            x = torch.randn(rows, num_in)
            found = kernels.pack_quantized_linear(parts, None, torch.float32)(x)
            assert_close(found[:, :40], x, parts[:1])
            torch.testing.assert_close(found[:, 40:73], multiply(x, parts[1]), rtol=1e-4, atol=1e-4)
            assert_close(found[:, 73:], x, parts[2:])

    @sweep(isa=_ISAS, kind=["q8_0", "q4_1", "q3_k"])
    def test_a_row_depends_on_itself_alone(self, isa: str, kind: str) -> None:
        """Bit by bit, as long as weights are not decoded: nor on the number of threads."""
        weight = fine(kind, 70, inputs(kind, 1))
        x = torch.randn(8, weight.shape[1]).to(torch.bfloat16)
        results = []
        for num_threads in (1, 2):
            kernels = CpuKernels(isa=isa, num_threads=num_threads)
            layer = kernels.pack_quantized_linear([weight], None, torch.bfloat16)
            results += [layer(x), torch.cat([layer(row[None]) for row in x])]
        assert all(torch.equal(results[0], other) for other in results[1:])

    @sweep(isa=_ISAS, dtype=DTYPES, rows=[3, 40], bad=[math.nan, math.inf, -math.inf])
    def test_what_is_no_number_shows_in_its_row_only(
        self, isa: str, dtype: torch.dtype, rows: int, bad: float
    ) -> None:
        weight = fine("q4_1", 50, 96)
        layer = CpuKernels(isa=isa, num_threads=2).pack_quantized_linear([weight], None, dtype)
        x = torch.randn(rows, 96).to(dtype)
        broken = x.clone()
        broken[1, 70] = bad
        others = torch.arange(rows) != 1
        assert not layer(broken)[1].isfinite().any()
        assert torch.equal(layer(broken)[others], layer(x)[others])

    @sweep(isa=_ISAS, rows=[2, 40], size=[0.0, 1e-38, 9e-31, 2e-30, 1e-20, 1e30])
    def test_tiny_and_huge_activations(self, isa: str, rows: int, size: float) -> None:
        weight = fine("q8_0", 40, 64)
        x = torch.rand(rows, 64) * size
        layer = CpuKernels(isa=isa, num_threads=1).pack_quantized_linear(
            [weight], None, torch.float32
        )
        expected = exact(x, [weight])
        torch.testing.assert_close(
            layer(x).double(), expected, rtol=1e-3, atol=max(1e-28, size * 1e-3)
        )

    @pytest.mark.parametrize("isa", _ISAS)
    def test_ends_of_the_range_do_not_saturate(self, isa: str) -> None:
        """The largest numbers of weights and x, of one sign: sums of pairs are at their largest."""
        weight = fine("q4_1", 33, 64)
        weight.data.fill_(255)
        weight.data.view(33, 2, 20)[:, :, :4] = torch.tensor([0, 60, 0, 0])  # scale 1, minimum 0
        for value in (1.0, -1.0, 126.999):
            x = torch.full((3, 64), value)
            layer = CpuKernels(isa=isa, num_threads=1).pack_quantized_linear(
                [weight], None, torch.float32
            )
            torch.testing.assert_close(layer(x).double(), exact(x, [weight]), rtol=1e-4, atol=0)
