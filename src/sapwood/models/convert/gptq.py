"""GPTQ: weights are rounded one input after the other, and what an input's rounding changes in the
layer's outputs is made up for by the inputs that are still to come.

Source: Frantar et al. 2022, arXiv:2210.17323."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.models.convert.rounding import Grid, nearest

BLOCK_INPUTS = 64
"""Inputs after which all later ones are updated, by one matrix product."""
ATTEMPTS = 4
"""Each with ten times the damping of the one before."""

log = logging.getLogger(__name__)


def gptq_codes(
    weight: Tensor, hessian: Tensor, grid: Grid, *, act_order: bool, damping: float
) -> Tensor:
    """Codes [out, in] fp32 of a weight [out, in] fp32.

    hessian    [in, in] fp32; inputs that were always 0 are rounded to the nearest
    grid       the scales, chosen beforehand: so groups stay where they are in any order
    act_order  round the inputs of the largest activations first, while most others can make up
    damping    share of the mean diagonal that is added to it
    Raises     WeightError if the Hessian has no Cholesky factor even with much damping
    """
    num_inputs = weight.shape[1]
    order = torch.arange(num_inputs, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damping)
    columns = weight.t()[order].contiguous()
    codes = torch.empty_like(columns)
    groups = grid.group_of(num_inputs)[order].tolist()
    scale = grid.scale.t().contiguous()
    zero = None if grid.zero is None else grid.zero.t().contiguous()
    for first in range(0, num_inputs, BLOCK_INPUTS):
        end = min(first + BLOCK_INPUTS, num_inputs)
        errors = torch.empty_like(columns[first:end])
        for index in range(first, end):
            group = groups[index]
            shift = None if zero is None else zero[group]
            code = nearest(grid.scheme, columns[index], scale[group], shift)
            codes[index] = code
            value = (code if shift is None else code - shift) * scale[group]
            error = (columns[index] - value) / factor[index, index]
            errors[index - first] = error
            columns[index + 1 : end].addr_(factor[index, index + 1 : end], error, alpha=-1.0)
        columns[end:].addmm_(factor[first:end, end:].t(), errors, alpha=-1.0)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.t().contiguous()


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    diagonal = hessian.diagonal()
    never = diagonal == 0
    mean = diagonal[~never].mean().item() if not never.all() else 1.0
    for attempt in range(ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal()[never] = mean
        damped.diagonal().add_(damping * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(upper.isfinite().all()):
            if attempt:
                log.warning("gptq needed a damping of %g", damping * 10**attempt)
            factor: Tensor = upper
            return factor
    raise WeightError(
        f"the Hessian of a layer has no Cholesky factor even with a damping of "
        f"{damping * 10 ** (ATTEMPTS - 1):g}; give a longer calibration text or a larger --damping"
    )
