"""Codes and scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.convert.rounding import (
    Grid,
    ScaleFormat,
    choose_grid,
    nearest,
    scale_format,
)
from sapwood.convert.scheme import MXFP4, NF4, NVFP4, WeightScheme
from sapwood.kernels.coded import VALUES

INT8 = WeightScheme(num_bits=8)
FP32 = ScaleFormat(torch.float32)
FP8 = WeightScheme(num_bits=8, numbers="e4m3")
FP8_BLOCK = WeightScheme(num_bits=8, numbers="e4m3", strategy="block", group_size=128)


def int4(group_size: int, *, symmetric: bool = True) -> WeightScheme:
    return WeightScheme(
        num_bits=4,
        strategy="group",
        group_size=group_size,
        symmetric=symmetric,
        rounds_activations=False,
    )


SCHEMES = [INT8, FP8, FP8_BLOCK, int4(32), int4(64, symmetric=False), NVFP4, MXFP4, NF4]


def names(scheme: WeightScheme) -> str:
    return f"{scheme.numbers}-{scheme.strategy}{'' if scheme.symmetric else '-asymmetric'}"


def best_grid(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Grid:
    scales = scale_format(scheme, weight, dtype)
    return choose_grid(weight, scheme, importance=None, scales=scales)


def random_weight(num_rows: int = 256, num_columns: int = 384, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    return weight * torch.rand(num_rows, 1, generator=generator).add_(0.1)


def test_numbers_become_the_nearest_of_e2m1() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat([-numbers, numbers])
    x = torch.linspace(-7.0, 7.0, 2801)[None]
    found = nearest(NVFP4, x, torch.ones(1, 1), None)
    distance = (x[..., None] - numbers).abs()
    assert torch.equal((found - x).abs(), distance.amin(dim=-1))
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    assert nearest(NVFP4, ties, torch.ones(1, 1), None).tolist() == [[0, 1, 1, 2, 2, 4, 4]]


def test_numbers_become_the_nearest_of_nf4() -> None:
    values = torch.tensor(VALUES["nf4"])
    x = torch.linspace(-1.2, 1.2, 2401)[None]
    found = nearest(NF4, x * 3.0, torch.full((1, 1), 3.0), None)
    distance = (x[..., None] - values).abs()
    torch.testing.assert_close((found - x).abs(), distance.amin(dim=-1))


def test_parts_of_one_product_share_the_scale_of_the_tensor() -> None:
    small, large = random_weight(32, 64), random_weight(16, 64, seed=1) * 50
    scales = scale_format(NVFP4, torch.cat([small, large]), torch.bfloat16)
    assert scales.factor == scale_format(NVFP4, large, torch.bfloat16).factor
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
