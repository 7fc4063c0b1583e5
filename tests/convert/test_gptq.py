from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.convert.calibration import input_moments
from sapwood.convert.gptq import gptq_codes
from sapwood.convert.rounding import Grid, ScaleFormat, choose_grid, scale_format
from sapwood.convert.scheme import MXFP4, NVFP4, WeightScheme
from sapwood.convert.tapped import rounded_inputs

INT4 = WeightScheme(num_bits=4, strategy="group", group_size=32, rounds_activations=False)
INT4_ASYMMETRIC = WeightScheme(
    num_bits=4, strategy="group", group_size=32, symmetric=False, rounds_activations=False
)
FP8 = WeightScheme(num_bits=8, numbers="e4m3")
SCHEMES = {
    "int4": INT4,
    "int4-asymmetric": INT4_ASYMMETRIC,
    "fp8": FP8,
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
}
FP32 = ScaleFormat(torch.float32)


def correlated_inputs(num_tokens: int, in_size: int, *, seed: int = 0) -> Tensor:
    """Few directions, and entries of very different sizes, as decoders have them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(in_size // 4, in_size, generator=generator)
    x = torch.randn(num_tokens, in_size // 4, generator=generator) @ directions
    x += 0.3 * torch.randn(num_tokens, in_size, generator=generator)
    return x * torch.rand(in_size, generator=generator).mul(3).exp()


def fit(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    lost: Tensor | None = None,
    act_order: bool = True,
    damping: float = 0.01,
) -> tuple[Tensor, Grid]:
    return gptq_codes(
        weight,
        hessian,
        lambda _: grid,
        lost=lost,
        act_order=act_order,
        damping=damping,
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_outputs_change_less_than_with_rounding_to_the_nearest(
    scheme: WeightScheme, act_order: bool
) -> None:
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(1))
    fitted, unseen = torch.split(correlated_inputs(2500, 160), [2000, 500])
    hessian = fitted.t() @ fitted
    scales = scale_format(scheme, weight, torch.float32)
    grid = choose_grid(weight, scheme, importance=hessian.diagonal(), scales=scales)
    codes, fitted_grid = fit(weight, hessian, grid, act_order=act_order)

    def error(values: Tensor) -> float:
        return (unseen @ (values - weight).t()).norm().item()

    assert error(fitted_grid.values(codes)) < 0.6 * error(grid.values(grid.codes(weight)))
    # They are codes of that grid, each in its own place: another round changes nothing.
    assert torch.equal(fitted_grid.codes(fitted_grid.values(codes)), codes)


@pytest.mark.parametrize("scheme", [WeightScheme(num_bits=8), FP8], ids=["int8", "fp8"])
def test_weights_make_up_for_the_rounding_of_inputs(scheme: WeightScheme) -> None:
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(5))
    fitted, unseen = torch.split(correlated_inputs(4500, 160), [4000, 500])
    moments = input_moments([fitted], [fitted], scheme)
    grid = choose_grid(weight, scheme, importance=None, scales=FP32)

    def error(lost: Tensor | None) -> float:
        codes, fitted_grid = fit(weight, moments.hessian, grid, lost=lost, damping=0.001)
        found = rounded_inputs(unseen, scheme) @ fitted_grid.values(codes).t()
        return (found - unseen @ weight.t()).norm().item()

    assert error(moments.lost) < 0.98 * error(None)


def test_weights_make_up_for_inputs_that_differ_from_the_original_models() -> None:
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(6))
    original = correlated_inputs(4500, 160)
    distortion = torch.eye(160) + 0.05 * correlated_inputs(160, 160, seed=7) / 40
    received = original @ distortion
    moments = input_moments([received[:4000]], [original[:4000]], INT4)
    grid = choose_grid(weight, INT4, importance=None, scales=FP32)

    def error(lost: Tensor | None) -> float:
        codes, fitted_grid = fit(weight, moments.hessian, grid, lost=lost)
        found = received[4000:] @ fitted_grid.values(codes).t()
        return (found - original[4000:] @ weight.t()).norm().item()

    assert error(moments.lost) < 0.7 * error(None)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_scales_are_those_of_the_weights_that_make_up_for_what_was_lost(
    scheme: WeightScheme,
) -> None:
    """Inputs have halved: weights twice as large are wanted."""
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(8))
    original = correlated_inputs(4500, 160)
    received = original / 2
    moments = input_moments([received[:4000]], [original[:4000]], INT4)
    scales = scale_format(scheme, weight, torch.float32)
    codes, grid = gptq_codes(
        weight,
        moments.hessian,
        partial(choose_grid, scheme=scheme, importance=moments.hessian.diagonal(), scales=scales),
        lost=moments.lost,
        act_order=True,
        damping=0.001,
    )
    wanted = original[4000:] @ weight.t()
    found = received[4000:] @ grid.values(codes).t()
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest(act_order: bool) -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(2))
    hessian = torch.diag(torch.rand(96) + 0.5)
    grid = choose_grid(weight, INT4, importance=None, scales=FP32)
    codes, fitted_grid = fit(weight, hessian, grid, act_order=act_order)
    assert torch.equal(codes, fitted_grid.codes(weight))


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(3))
    x = correlated_inputs(500, 96)
    x[:, 10:20] = 0.0
    grid = choose_grid(weight, INT4, importance=None, scales=FP32)
    codes, fitted_grid = fit(weight, x.t() @ x, grid)
    assert torch.equal(codes[:, 10:20], fitted_grid.codes(weight)[:, 10:20])


def test_fewer_inputs_than_entries_are_enough() -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(4))
    x = correlated_inputs(3, 96)
    grid = choose_grid(weight, INT4, importance=None, scales=FP32)
    codes, fitted_grid = fit(weight, x.t() @ x, grid, act_order=False)
    values = fitted_grid.values(codes)
    plain = grid.values(grid.codes(weight))
    assert (x @ (values - weight).t()).norm() < (x @ (plain - weight).t()).norm()


def test_a_hessian_that_is_none_is_refused() -> None:
    weight = torch.ones(8, 32)
    grid = choose_grid(weight, INT4, importance=None, scales=FP32)
    with pytest.raises(WeightError, match="longer calibration text or a larger --damping"):
        fit(weight, torch.full((32, 32), torch.nan), grid)
