"""GPTQ: weights are rounded one input after the other, and the weights of later inputs make up for
the change that each rounding causes in the layer's outputs. Then codes and scales are improved in
turn (descent.py).

Sources: Frantar et al. 2022, arXiv:2210.17323; Li et al. 2025, arXiv:2504.02692 (weights that make
up for what inputs have lost)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.convert.descent import descend
from sapwood.convert.rounding import Grid, nearest_shifted

BLOCK_INPUTS = 64
"""Inputs after which all later ones are updated, by one matrix product."""
NUM_SWEEPS = 3
ATTEMPTS = 4
"""Attempts at a Cholesky factor, each with ten times the damping of the attempt before."""

log = logging.getLogger(__name__)


def gptq_codes(
    weight: Tensor,
    hessian: Tensor,
    choose_grid: Callable[[Tensor], Grid],
    *,
    lost: Tensor | None = None,
    act_order: bool,
    damping: float,
) -> tuple[Tensor, Grid]:
    """Codes [out, in] fp32 of a weight [out, in] fp32, and the grid with scales that fit them.

    hessian      [in, in] fp32; inputs that were always 0 are rounded to the nearest
    choose_grid  chooses scales for all numbers [out, in] fp32 before any is rounded, so that groups
                 stay the same in whatever order inputs are rounded
    lost         [in, in] fp32, the sum of (x - r) r^T over inputs r that should have been x, where
                 the Hessian is the sum of r r^T; weights make up for that loss too. None: no loss
    act_order    whether inputs with the largest activations are rounded first, while most others
                 can still make up for them
    damping      share of the mean diagonal that is added to the diagonal
    Raises       WeightError if the Hessian has no Cholesky factor even with much damping
    """
    num_inputs = weight.shape[1]
    order = torch.arange(num_inputs, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    damped, inverse, factor = _inverse(hessian[order][:, order], damping)
    columns = weight.t()[order].contiguous()
    if lost is not None:
        # The weights with the smallest squared error for the inputs as they arrive: W x ~ V r has
        # V = W (sum x r^T) (sum r r^T)^-1 = W + W (sum (x - r) r^T) (sum r r^T)^-1.
        columns += inverse @ (lost[order][:, order].t() @ columns)
    back = torch.empty_like(order)
    back[order] = torch.arange(num_inputs, device=order.device)
    target = columns[back].t().contiguous()
    grid = choose_grid(target)
    groups = grid.group_of(num_inputs)[order].tolist()
    scales = grid.scale.t().contiguous().unbind()
    zeros = None if grid.zero is None else grid.zero.t().contiguous().unbind()
    # Each row divided by its diagonal, so that errors need not be.
    factor = factor / factor.diagonal()[:, None]
    shifted = torch.empty_like(columns)
    for first in range(0, num_inputs, BLOCK_INPUTS):
        end = min(first + BLOCK_INPUTS, num_inputs)
        block = columns[first:end]
        errors = torch.empty_like(block)
        rows = factor[first:end, first:end].unbind()
        for index, column in enumerate(block.unbind()):
            group = groups[first + index]
            shift = None if zeros is None else zeros[group]
            code = nearest_shifted(grid.scheme, column / scales[group], shift)
            shifted[first + index] = code
            error = torch.sub(column, code.mul_(scales[group]), out=errors[index])
            block[index + 1 :].addr_(rows[index][index + 1 :], error, alpha=-1.0)
        columns[end:].addmm_(factor[first:end, end:].t(), errors, alpha=-1.0)
    shifted = shifted[back]
    if grid.zero is not None:
        shifted += grid.zero.t()[grid.group_of(num_inputs)]
    return descend(target, damped[back][:, back], grid, shifted.t(), num_sweeps=NUM_SWEEPS)


def _inverse(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The damped Hessian, its inverse, and the upper Cholesky factor of that."""
    diagonal = hessian.diagonal()
    never = diagonal == 0
    mean = diagonal[~never].mean().item() if not never.all() else 1.0
    for attempt in range(ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal()[never] = mean
        damped.diagonal().add_(damping * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and bool(upper.isfinite().all()):
            if attempt:
                log.warning("gptq needed a damping of %g", damping * 10**attempt)
            return damped, inverse, upper
    raise WeightError(
        f"the Hessian of a layer has no Cholesky factor even with a damping of "
        f"{damping * 10 ** (ATTEMPTS - 1):g}; give a longer calibration text or a larger --damping"
    )
