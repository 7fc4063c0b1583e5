from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.convert.descent import descend
from sapwood.convert.rounding import Grid, ScaleFormat, choose_grid, scale_format
from sapwood.convert.scheme import WeightScheme
from tests.convert.test_gptq import SCHEMES, correlated_inputs

FP8_BLOCK = WeightScheme(num_bits=8, numbers="e4m3", strategy="block", group_size=128)


def squared_error(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    difference = (weight - values).double()
    return torch.sum((difference @ hessian.double()) * difference).item()


def hessian_of(in_size: int) -> Tensor:
    x = correlated_inputs(800, in_size)
    return x.t() @ x + 10.0 * torch.eye(in_size)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_sweep_lowers_the_error_of_the_outputs(scheme: WeightScheme) -> None:
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(1))
    hessian = hessian_of(160)
    scales = scale_format(scheme, weight, torch.bfloat16)
    grid = choose_grid(weight, scheme, importance=None, scales=scales)
    codes = grid.codes(weight)
    errors = [squared_error(weight, grid.values(codes), hessian)]
    for _ in range(3):
        codes, grid = descend(weight, hessian, grid, codes, num_sweeps=1)
        errors.append(squared_error(weight, grid.values(codes), hessian))
        assert torch.equal(grid.scale, scales.nearest(grid.scale))
        assert codes.min() >= scheme.lowest
        assert codes.max() <= scheme.highest
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


def test_several_sweeps_are_as_many_single_ones() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    scheme, hessian = SCHEMES["int4-asymmetric"], hessian_of(96)
    grid = choose_grid(weight, scheme, importance=None, scales=ScaleFormat(torch.float32))

    def after(sweeps: list[int]) -> tuple[Tensor, Grid]:
        codes, found = grid.codes(weight), grid
        for count in sweeps:
            codes, found = descend(weight, hessian, found, codes, num_sweeps=count)
        return codes, found

    (codes, once), (again, one_by_one) = after([3]), after([1, 1, 1])
    assert (codes != again).float().mean() < 0.01  # sums in another order decide a few
    torch.testing.assert_close(once.scale, one_by_one.scale, rtol=0.05, atol=0)


def test_scales_of_blocks_stay_shared() -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(3))
    scales = ScaleFormat(torch.bfloat16)
    grid = choose_grid(weight, FP8_BLOCK, importance=None, scales=scales)
    hessian = hessian_of(128)
    codes, found = descend(weight, hessian, grid, grid.codes(weight), num_sweeps=2)
    assert torch.equal(found.scale, grid.scale)
    before = squared_error(weight, grid.values(grid.codes(weight)), hessian)
    assert squared_error(weight, found.values(codes), hessian) < 0.6 * before
