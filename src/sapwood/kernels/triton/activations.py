"""Rounding activations to int8 or FP8 (E4M3) when a layer is called: one scale per token and group
of inputs. The rounding of int8 is kernels/quantized.py's, bit by bit."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.triton.small_floats import encode

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


_AT_ONCE = 2048
"""Numbers that one program rounds, unless a single group has more."""


@dataclass(frozen=True, slots=True)
class RoundedActivations:
    """Activations x, which are about number * scale.

    numbers  [T, groups * group_inputs] int8 or float8_e4m3fn; zeros after the last input
    scales   [T, groups] fp32
    """

    numbers: Tensor
    scales: Tensor


@triton.jit
def _round(
    x_ptr,
    numbers_ptr,
    scales_ptr,
    width,
    x_stride,
    num_groups,
    LARGEST: tl.constexpr,
    IS_INT8: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK_G groups of one token: max |x| below 1e-30 counts as zero; NaN or an infinity makes the
    scale NaN."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    place = tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + place[None, :]
    is_group = group < num_groups
    in_group = is_group[:, None] & (place < GROUP)[None, :]
    x = tl.load(x_ptr + token * x_stride + column, mask=in_group & (column < width), other=0.0)
    x = x.to(tl.float32)
    magnitude = tl.abs(x)
    largest = tl.max(magnitude, axis=1)
    is_finite = tl.sum((magnitude < float("inf")).to(tl.int32), axis=1) == BLOCK
    is_used = is_finite & (largest >= 1e-30)
    safe = tl.where(is_used, largest, 1.0)
    top = tl.full((BLOCK_G,), LARGEST, tl.float32)
    scaled = tl.where(is_used[:, None], x * tl.div_rn(top, safe)[:, None], 0.0)
    scale = tl.where(is_used, tl.div_rn(safe, top), 0.0)
    scale = tl.where(is_finite, scale, float("nan"))
    if IS_INT8:
        # Rounds half to even: the sum has no bits left for fractions.
        numbers = ((scaled + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
        numbers = encode(scaled, 3, 7).to(tl.uint8)
    to = numbers_ptr + token * num_groups * GROUP + column
    tl.store(to, numbers, mask=in_group)
    tl.store(scales_ptr + token * num_groups + group, scale, mask=is_group)


def round_activations(x: Tensor, group_inputs: int, dtype: torch.dtype) -> RoundedActivations:
    """x [T, in] of a float dtype -> int8 or float8_e4m3fn numbers with one scale per token and
    `group_inputs` inputs, the last group filled up with zeros.

    Raises ValueError for another dtype."""
    if dtype not in _LARGEST:
        raise ValueError(f"activations are rounded to int8 or float8_e4m3fn, not to {dtype}")
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    num_groups = triton.cdiv(width, group_inputs)
    numbers = torch.empty((rows, num_groups * group_inputs), dtype=dtype, device=x.device)
    scales = torch.empty((rows, num_groups), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(group_inputs)
    block_groups = triton.next_power_of_2(min(num_groups, max(1, _AT_ONCE // block)))
    # Fused, the product and the sum of the rounding would be rounded once instead of twice.
    _round[(rows, triton.cdiv(num_groups, block_groups))](
        x, numbers if dtype == torch.int8 else numbers.view(torch.uint8), scales, width,
        x.stride(0), num_groups, LARGEST=_LARGEST[dtype],
        IS_INT8=dtype == torch.int8, GROUP=group_inputs, BLOCK_G=block_groups, BLOCK=block,
        num_warps=min(16, max(1, block * block_groups // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return RoundedActivations(numbers, scales)
