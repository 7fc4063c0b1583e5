"""Codes, scales and packing, against compressed-tensors itself."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from sapwood.models.convert.rounding import (
    Grid,
    ScaleFormat,
    choose_grid,
    nearest,
    pack,
    pack_e2m1,
    scale_format,
    stored_tensors,
)
from sapwood.models.convert.scheme import MXFP4, NVFP4, WeightScheme, quantization_config
from tests.quantized_checkpoints import four_bit_floats

INT8 = WeightScheme(num_bits=8)
FP32 = ScaleFormat(torch.float32)
FP8 = WeightScheme(num_bits=8, is_float=True)
FP8_BLOCK = WeightScheme(num_bits=8, is_float=True, strategy="block", group_size=128)


def int4(group_size: int, *, symmetric: bool = True) -> WeightScheme:
    return WeightScheme(
        num_bits=4,
        strategy="group",
        group_size=group_size,
        symmetric=symmetric,
        rounds_activations=False,
    )


SCHEMES = [INT8, FP8, FP8_BLOCK, int4(32), int4(64, symmetric=False), NVFP4, MXFP4]
LOSS = {(8, False): 0.012, (8, True): 0.03, (4, False): 0.11, (4, True): 0.12}
"""Relative error of normal numbers, by bits and whether they are floats."""


def names(scheme: WeightScheme) -> str:
    return f"{scheme.format}-{scheme.strategy}{'' if scheme.symmetric else '-asymmetric'}"


def best_grid(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Grid:
    scales = scale_format(scheme, [weight], dtype)
    return choose_grid(weight, scheme, importance=None, scales=scales)


def random_weight(num_rows: int = 256, num_columns: int = 384, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    return weight * torch.rand(num_rows, 1, generator=generator).add_(0.1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_library_reads_exactly_the_weights_that_were_meant(
    scheme: WeightScheme, dtype: torch.dtype
) -> None:
    weight = random_weight()
    grid = best_grid(weight, scheme, dtype)
    codes = grid.codes(weight)
    tensors = stored_tensors(codes, grid)
    config = QuantizationConfig(**quantization_config(scheme, ["lm_head"], act_order=False))
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    # Scales as fp32: the same numbers, and the library's product is then not rounded again.
    wide = {
        name: tensor.float() if tensor.dtype == dtype else tensor
        for name, tensor in tensors.items()
    }
    read = compressor.decompress(wide, group)["weight"]
    if scheme.is_e2m1:  # which the library rounds to bfloat16
        exact = four_bit_floats(tensors, weight.shape[1])
        torch.testing.assert_close(grid.values(codes).double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(read.double(), exact, rtol=2**-7, atol=0)
    else:
        assert torch.equal(read.float(), grid.values(codes))
        assert tensors["weight_scale"].dtype == dtype
    assert (read - weight).norm() < LOSS[scheme.num_bits, scheme.is_float] * weight.norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_planned_size_is_the_size(scheme: WeightScheme) -> None:
    weight = random_weight()
    grid = best_grid(weight, scheme, torch.bfloat16)
    tensors = stored_tensors(grid.codes(weight), grid)
    assert sum(one.nbytes for one in tensors.values()) == scheme.num_bytes((256, 384), 2)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_packing_is_the_library_s(num_bits: int) -> None:
    scheme = WeightScheme(num_bits=num_bits, rounds_activations=False)
    codes = torch.randint(int(scheme.lowest), int(scheme.highest) + 1, (24, 64))
    expected = pack_to_int32(codes.to(torch.int8), num_bits)
    assert torch.equal(pack(codes.to(torch.int32), scheme), expected)


def test_packing_of_e2m1_is_the_library_s() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    choice = torch.randint(16, (24, 64))
    codes = numbers[choice % 8] * torch.where(choice < 8, 1.0, -1.0)
    # The library keeps the sign of zero, which we do not.
    assert torch.equal(pack_e2m1(codes), pack_fp4_to_uint8(codes + 0.0))


def test_numbers_become_the_nearest_of_e2m1() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat([-numbers, numbers])
    x = torch.linspace(-7.0, 7.0, 2801)[None]
    found = nearest(NVFP4, x, torch.ones(1, 1), None)
    distance = (x[..., None] - numbers).abs()
    assert torch.equal((found - x).abs(), distance.amin(dim=-1))
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    assert nearest(NVFP4, ties, torch.ones(1, 1), None).tolist() == [[0, 1, 1, 2, 2, 4, 4]]


def test_parts_of_one_product_share_the_scale_of_the_tensor() -> None:
    small, large = random_weight(32, 64), random_weight(16, 64, seed=1) * 50
    scales = scale_format(NVFP4, [small, large], torch.bfloat16)
    assert scales.factor == scale_format(NVFP4, [large], torch.bfloat16).factor
    for weight in (small, large):
        grid = choose_grid(weight, NVFP4, importance=None, scales=scales)
        values = grid.values(grid.codes(weight))
        assert (values - weight).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_weights_that_fit_are_kept(scheme: WeightScheme) -> None:
    """What was rounded once is not changed by rounding it again."""
    weight = random_weight()
    once = best_grid(weight, scheme, torch.float32)
    values = once.values(once.codes(weight))
    again = Grid(scheme, once.scales, once.scale, once.zero)
    assert torch.allclose(again.values(again.codes(values)), values, atol=1e-6)


@pytest.mark.parametrize("scheme", [INT8, int4(32), int4(64, symmetric=False)], ids=names)
def test_searched_scales_are_never_worse_than_those_of_the_whole_range(
    scheme: WeightScheme,
) -> None:
    weight = random_weight()
    importance = torch.rand(weight.shape[1]) ** 4

    def errors(shares: tuple[float, ...] | None) -> Tensor:
        grid = choose_grid(weight, scheme, importance=importance, scales=FP32, shares=shares)
        square = (grid.values(grid.codes(weight)) - weight).square() * importance
        return square.view(-1, scheme.group_size or weight.shape[1]).sum(dim=1)

    searched, whole = errors(None), errors((1.0,))
    assert bool((searched <= whole * (1 + 1e-5)).all())
    assert searched.sum() < 0.97 * whole.sum()


def test_importance_meets_the_inputs_that_it_is_of() -> None:
    """Two groups per row: errors are made where they count least."""
    weight = random_weight(8, 64)
    importance = torch.cat([torch.ones(32), torch.full((32,), 1e-6)])
    importance[0] = 1e6
    grid = choose_grid(weight, int4(32), importance=importance, scales=FP32)
    plain = choose_grid(weight, int4(32), importance=None, scales=FP32)
    first = (grid.values(grid.codes(weight)) - weight)[:, 0].square().sum()
    assert first < (plain.values(plain.codes(weight)) - weight)[:, 0].square().sum()
    assert torch.equal(grid.scale[:, 1], plain.scale[:, 1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_row_of_zeros_stays_zero(scheme: WeightScheme) -> None:
    weight = random_weight()
    weight[:128] = 0.0
    for dtype in (torch.float16, torch.bfloat16):
        grid = best_grid(weight, scheme, dtype)
        values = grid.values(grid.codes(weight))
        assert bool((values[:128] == 0).all())
        assert bool(values.isfinite().all())


def test_numbers_beyond_the_range_become_its_end() -> None:
    scale = torch.ones(1, 1)
    big = torch.tensor([[1e9, -1e9, 0.4]])
    assert nearest(INT8, big, scale, None).tolist() == [[127, -128, 0]]
    assert nearest(FP8, big, scale, None)[0, :2].tolist() == [448, -448]
