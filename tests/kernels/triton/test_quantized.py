"""Quantised products: int8 and GGUF's blocks against the reference, FP8 against its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sapwood.kernels.coded import CODES, CodedWeight
from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.quantized import KINDS, QuantizedWeight
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import round_rows
from sapwood.kernels.triton.activations import round_activations
from sapwood.kernels.triton.ops import TritonKernels
from sapwood.kernels.triton.packing import packed_codes
from sapwood.kernels.triton.scaled_matmul import scaled_matmul
from sapwood.kernels.triton.tiles import TileChoice
from tests.kernels.test_coded import exact
from tests.kernels.test_coded import random_weight as random_codes
from tests.kernels.test_quantized import inputs, random_weight
from tests.layers.quantization.formats.test_formats import made, read
from tests.quantized_checkpoints import CASES
from tests.tiers import sweep

TRITON = TritonKernels()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Of the largest entry. The interpreter cuts bfloat16 off where the GPU rounds: weights too."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.float().cpu() - expected.float().cpu()).abs().max().item()
    assert error <= tolerance * expected.float().abs().max().item()


def of_dequantized(
    x: Tensor, parts: list[QuantizedWeight], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product with the weights as numbers of `dtype`, in fp32."""
    weight = torch.cat([part.dequantized(dtype).float() for part in parts])
    out = x.float() @ weight.T.to(x.device)
    return out if bias is None else out + bias.float()


@sweep(kind=KINDS, shape=[(1, 40, 96), (17, 70, 160)], dtype=[torch.float32, torch.bfloat16])
def test_layers(
    device: torch.device, kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Of each shape: rows, outputs, inputs."""
    rows, num_out, num_in = shape
    num_in = max(num_in, inputs(kind, 1))
    weight = random_weight(kind, num_out, num_in)
    x = torch.randn(rows, num_in).to(dtype)
    bias = torch.randn(num_out).to(dtype) if rows == 1 else None
    if kind == "int8":
        reference: PackedLinear = ReferenceKernels().pack_quantized_linear([weight], bias, dtype)
        want = reference.fp32(x)
    else:
        want = of_dequantized(x, [weight], bias, dtype)
    on_device = None if bias is None else bias.to(device)
    layer = TRITON.pack_quantized_linear([weight.to(device)], on_device, dtype)
    result = layer(x.to(device))
    assert result.dtype == dtype
    assert_close(result, want, TOLERANCE[dtype])
    wide = layer.fp32(x.to(device))
    assert wide.dtype == torch.float32
    assert_close(wide, want, 1e-5 if kind == "int8" else TOLERANCE[dtype])


def test_parts_of_different_kinds_fill_their_own_columns(device: torch.device) -> None:
    parts = [random_weight(kind, n, 64) for kind, n in (("q8_0", 5), ("q4_1", 40), ("q4_0", 3))]
    x, bias = torch.randn(3, 64), torch.randn(48)
    on_device = [part.to(device) for part in parts]
    layer = TRITON.pack_quantized_linear(on_device, bias.to(device), torch.float32)
    # Rows of x may lie apart.
    apart = torch.zeros(3, 2, 64, device=device)
    apart[:, 1] = x.to(device)
    assert_close(layer(apart[:, 1]), of_dequantized(x, parts, bias, torch.float32), 1e-5)


def test_what_does_not_fit_is_refused() -> None:
    one, other = random_weight("int8", 4, 64), random_weight("q8_0", 4, 32)
    with pytest.raises(ValueError, match=r"different inputs: \[32, 64\]"):
        TRITON.pack_quantized_linear([one, other], None, torch.float32)
    with pytest.raises(ValueError, match=r"bias \[3\] must be \[4\]"):
        TRITON.pack_quantized_linear([one], torch.zeros(3), torch.float32)
    layer = TRITON.pack_quantized_linear([one], None, torch.float32)
    with pytest.raises(ValueError, match=r"x \[2, 63\] does not fit a quantised weight \[4, 64\]"):
        layer(torch.zeros(2, 63))
    with pytest.raises(ValueError, match=r"not to torch\.float16"):
        round_activations(torch.zeros(1, 8), 8, torch.float16)


@sweep(
    codes=CODES,
    shape=[(33, 64, 16), (40, 96, 32), (35, 272, 128), (21, 100, 100), (7, 120, 24), (5, 20, 32)],
    dtype=[torch.float32, torch.bfloat16],
)
def test_codes(
    device: torch.device, codes: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Groups as wide as a block and narrower, of a width that no block has, and single ones.

    Of each shape: outputs, inputs, inputs of a group."""
    num_out, num_in, group = shape
    rows, is_odd = (1, False) if num_out % 2 else (17, True)
    weight = random_codes(
        codes, (num_out, num_in, group), shifts=is_odd, order=is_odd, out_scales=num_in > 96
    )
    x = torch.randn(rows, num_in).to(dtype)
    layer = TRITON.pack_quantized_linear([weight.to(device)], None, dtype)
    assert_close(layer.fp32(x.to(device)), exact(x, weight), TOLERANCE[dtype])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("shift", [None, 3.0])
def test_every_code_stands_for_its_value(
    device: torch.device, codes: str, shift: float | None
) -> None:
    """One output per code, so that E4M3's NaN stays in its own."""
    num_codes = 256 if codes in ("int8", "e4m3") else 16
    data = torch.arange(num_codes, dtype=torch.uint8).unsqueeze(1)
    ones = torch.ones(num_codes, 1)
    shifts = None if shift is None else shift * ones
    weight = CodedWeight(codes, (num_codes, 1), data, ones, 8, shifts)
    layer = TRITON.pack_quantized_linear([weight.to(device)], None, torch.float32)
    torch.testing.assert_close(
        layer(torch.ones(1, 1, device=device)).cpu(),
        weight.dequantized(torch.float32).T,
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("name", CASES)
def test_every_format_of_a_checkpoint(device: torch.device, name: str) -> None:
    tensors, _ = made(name)
    weight = read(name, tensors)
    rounds = isinstance(weight, QuantizedWeight) or weight.rounds_inputs
    x = torch.randn(3, weight.shape[1])
    layer = TRITON.pack_quantized_linear([weight.to(device)], None, torch.float32)
    want = x @ weight.dequantized(torch.float32).T
    # E4M3 has steps of an eighth, which even out over the sum.
    assert_close(layer(x.to(device)), want, 4e-2 if rounds else 1e-5)


def test_weights_of_codes_stay_as_small_as_they_are() -> None:
    for codes in CODES:
        weight = random_codes(codes, (64, 256, 32), shifts=True, out_scales=True)
        assert packed_codes(weight).num_bytes <= weight.num_bytes


@pytest.mark.parametrize("group", [64, 32, 300])
def test_activations_are_rounded_as_the_reference_rounds_them(
    device: torch.device, group: int
) -> None:
    x = torch.randn(4, 300) * torch.tensor([[1.0], [1e-31], [1e30], [1.0]])
    x[3, 5] = torch.nan
    rounded = round_activations(x.to(device), group, torch.int8)
    filled = torch.nn.functional.pad(x, (0, rounded.numbers.shape[1] - 300))
    numbers, scales = round_rows(filled.view(4, -1, group))
    assert torch.equal(rounded.numbers.cpu(), numbers.flatten(1).to(torch.int8))
    torch.testing.assert_close(
        rounded.scales.cpu(), scales.squeeze(2), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("group", [128, 256])
def test_activations_in_fp8(device: torch.device, group: int) -> None:
    x = torch.randn(3, 256)
    rounded = round_activations(x.to(device), group, torch.float8_e4m3fn)
    groups = x.view(3, -1, group)
    scales = groups.abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(rounded.scales.cpu(), scales.squeeze(2))
    want = (groups / scales).view(3, 256).to(torch.float8_e4m3fn).float()
    # The product with a reciprocal may fall on the other side of a half.
    assert (rounded.numbers.cpu().float() != want).float().mean() <= 0.01


@pytest.mark.parametrize("group", [32, 128, 256])
@pytest.mark.parametrize(("rows", "num_out"), [(2, 200), (20, 30)])
def test_fp8_layers(device: torch.device, rows: int, num_out: int, group: int) -> None:
    """Weights that were made for FP8 activations: x is rounded per token, or per group too."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 products: they need compute capability 8.9")
    num_in = 256
    weight = replace(random_codes("e4m3", (num_out, num_in, group)), rounds_inputs=True)
    x, bias = torch.randn(rows, num_in, device=device), torch.randn(num_out, device=device)
    rounded = round_activations(x, group, torch.float8_e4m3fn)
    kept = rounded.numbers.float().view(rows, -1, group) * rounded.scales[:, :, None]
    want = kept.view(rows, num_in) @ weight.dequantized(torch.float32).T.to(device) + bias
    layer = TRITON.pack_quantized_linear([weight.to(device)], bias, torch.float32)
    assert_close(layer(x), want, 1e-3)


@pytest.mark.parametrize("group", [24, 48, 160])
def test_fp8_weights_whose_groups_have_no_product_are_decoded(
    device: torch.device, group: int
) -> None:
    weight = replace(random_codes("e4m3", (20, 240, group)), rounds_inputs=True)
    x = torch.randn(2, 240)
    layer = TRITON.pack_quantized_linear([weight.to(device)], None, torch.float32)
    assert_close(layer(x.to(device)), exact(x, weight), 1e-5)


def test_scales_that_do_not_fit_are_refused(device: torch.device) -> None:
    rounded = round_activations(torch.zeros(1, 64, device=device), 64, torch.int8)
    weight = torch.zeros(4, 64, dtype=torch.int8, device=device)
    out = torch.zeros(1, 4, device=device)
    with pytest.raises(ValueError, match=r"the scales must be \[4, 1\]"):
        scaled_matmul(rounded, weight, torch.ones(3, device=device), None, out, TileChoice())
