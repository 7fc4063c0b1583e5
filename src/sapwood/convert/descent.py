"""Coordinate descent: codes and scales that gptq found, improved one after the other.

gptq decides about each input once, before it knows how later inputs are rounded. A further sweep
over all inputs makes each code the best one beside the present codes of all others, and each
group's scale the best one for the codes of its group. So the squared error of the layer's outputs
only falls.

Source: Behdin et al. 2023, arXiv:2309.01885."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sapwood.convert.rounding import Grid, ScaleFormat, nearest_shifted

BLOCK_INPUTS = 64
"""Inputs after which the error of all others is updated, unless groups are shorter."""


def descend(
    target: Tensor,
    hessian: Tensor,
    grid: Grid,
    codes: Tensor,
    *,
    num_sweeps: int,
) -> tuple[Tensor, Grid]:
    """Better codes [out, in] fp32 for weights that should be `target` [out, in] fp32.

    hessian     [in, in] fp32: the error is the sum over outputs of d H d^T, d = target - weights
    codes       [out, in] fp32, to begin with
    num_sweeps  over all inputs
    """
    num_inputs = target.shape[1]
    group = grid.group_of(num_inputs)
    scale = grid.scale.t().clone()
    zero = None if grid.zero is None else grid.zero.t().contiguous()
    shifted = codes.t().contiguous()
    if zero is not None:
        shifted -= zero[group]
    # The error's gradient, halved: H d, of all inputs.
    pull = hessian @ (target.t() - shifted * scale[group])
    size = grid.scheme.group_size or num_inputs
    diagonal = hessian.diagonal()[:, None]
    # Column j: what a step of input j's code changes in the steps that all inputs want.
    coupling = (hessian / diagonal).t().contiguous()
    for _ in range(num_sweeps):
        for first in range(0, num_inputs, size):
            if grid.scheme.strategy != "block":  # whose scales are shared with other outputs
                end = first + size
                _refit(first, end, first // size, hessian, shifted, scale, pull, grid.scales)
            own = scale[first // size]
            shift = None if zero is None else zero[first // size]
            for start in range(first, first + size, BLOCK_INPUTS):
                end = min(start + BLOCK_INPUTS, first + size)
                wanted = pull[start:end] / diagonal[start:end] / own
                changes = torch.empty_like(wanted)
                rows = coupling[start:end, start:end].unbind()
                codes_here = shifted[start:end].unbind()
                for index, step in enumerate(wanted.unbind()):
                    old = codes_here[index]
                    code = nearest_shifted(grid.scheme, old + step, shift)
                    change = torch.sub(code, old, out=changes[index])
                    old.copy_(code)
                    wanted[index + 1 :].addr_(rows[index][index + 1 :], change, alpha=-1.0)
                pull.addmm_(hessian[:, start:end], changes.mul_(own), alpha=-1.0)
    if zero is not None:
        shifted += zero[group]
    return shifted.t().contiguous(), replace(grid, scale=scale.t().contiguous())


def _refit(
    first: int,
    end: int,
    group: int,
    hessian: Tensor,
    shifted: Tensor,
    scale: Tensor,
    pull: Tensor,
    scales: ScaleFormat,
) -> None:
    """Set the scale [out] of one group to the best one for its codes, where that is positive."""
    own = shifted[first:end]
    curvature = (own * (hessian[first:end, first:end] @ own)).sum(dim=0)
    slope = (own * pull[first:end]).sum(dim=0)
    old = scale[group].clone()
    best = old + torch.where(curvature > 0, slope / curvature, 0.0)
    stored = scales.nearest(best)
    # The rounded best scale may be worse than the old scale.
    step = stored - old
    better = (best > 0) & (curvature * step * step < 2 * slope * step)
    step = torch.where(better, step, 0.0)
    scale[group] += step
    pull.addmm_(hessian[:, first:end], own * step, alpha=-1.0)
