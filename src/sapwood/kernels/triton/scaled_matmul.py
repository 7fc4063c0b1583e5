"""Products of rounded activations and rounded weights, both int8 or both FP8 (E4M3).

int8 sums are exact within a group of inputs; the rest is fp32. Errors against the same product in
fp32, of the largest entry: 1e-5 for int8; for FP8 1e-3, since Hopper's matrix units keep about 14
bits of a sum while they add."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.triton.activations import RoundedActivations
from sapwood.kernels.triton.tiles import TileChoice

LEAST_GROUP = 32
"""Smallest number of inputs that share a scale of x, unless all inputs share one."""


@triton.jit(do_not_specialize=["rows"])
def _scaled_matmul(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    rows,
    num_out,
    num_in,
    num_x_groups,
    out_stride,
    X_GROUP: tl.constexpr,
    HAS_WEIGHT_GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """X_GROUP: inputs that share a scale of x; 0: all. HAS_WEIGHT_GROUPS: a weight scale is for
    X_GROUP inputs of an output; else for all of them."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows, in_outputs = m < rows, n < num_out
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * num_in + k[None, :]
    weight_ptrs = weight_ptr + n.to(tl.int64)[None, :] * num_in + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, num_in, BLOCK_K, loop_unroll_factor=UNROLL):
        inside = start + k < num_in
        x = tl.load(x_ptrs + start, mask=in_rows[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs + start, mask=inside[:, None] & in_outputs[None, :], other=0.0)
        if X_GROUP == 0 and not IS_INT8:
            total = tl.dot(x, weight, total)
        else:
            part = tl.dot(x, weight, out_dtype=tl.int32 if IS_INT8 else tl.float32)
            part = part.to(tl.float32)
            if X_GROUP > 0:
                group = start // X_GROUP
                scale = tl.load(x_scales_ptr + m * num_x_groups + group, mask=in_rows, other=0.0)
                part *= scale[:, None]
                if HAS_WEIGHT_GROUPS:
                    of_weight = weight_scales_ptr + n * num_x_groups + group
                    part *= tl.load(of_weight, mask=in_outputs, other=0.0)[None, :]
            total += part
    if X_GROUP == 0:
        total *= tl.load(x_scales_ptr + m, mask=in_rows, other=0.0)[:, None]
    if not HAS_WEIGHT_GROUPS:
        total *= tl.load(weight_scales_ptr + n, mask=in_outputs, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_rows[:, None] & in_outputs[None, :])


def scaled_matmul(
    x: RoundedActivations,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tiles: TileChoice,
) -> None:
    """Fill out [T, out] (fp32, bf16 or fp16; rows may be apart) with x @ weight.T + bias.

    weight         [out, in], of the dtype of x.numbers and with as many inputs, contiguous
    weight_scales  [out, 1] fp32, or [out, groups of x] fp32, contiguous
    Raises         ValueError if groups are no multiple of 32 inputs, or shapes do not fit
    """
    rows, num_in = x.numbers.shape
    num_out, num_groups = weight.shape[0], x.scales.shape[1]
    group = num_in // num_groups
    if num_groups > 1 and group % LEAST_GROUP:
        raise ValueError(f"groups of {group} inputs are no multiple of {LEAST_GROUP}")
    wanted = [(num_out, 1), (num_out, num_groups)]
    if weight.shape[1] != num_in or tuple(weight_scales.shape) not in wanted:
        raise ValueError(
            f"a weight {list(weight.shape)} with scales {list(weight_scales.shape)} does not fit "
            f"{num_in} inputs in {num_groups} groups: the scales must be {list(wanted[0])} or "
            f"{list(wanted[1])}"
        )
    is_grouped = num_groups > 1
    block_m, block_n, num_warps = tiles.of(rows)
    block_k = min(128, group & -group) if is_grouped else 128
    _scaled_matmul[(triton.cdiv(num_out, block_n), triton.cdiv(rows, block_m))](
        x.numbers, x.scales, weight, weight_scales, weight if bias is None else bias, out,
        rows, num_out, num_in, num_groups, out.stride(0),
        X_GROUP=group if is_grouped else 0, HAS_WEIGHT_GROUPS=weight_scales.shape[1] > 1,
        HAS_BIAS=bias is not None,
        IS_INT8=weight.dtype == torch.int8, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        UNROLL=256 // block_k if block_m == 16 else 1,
        num_warps=num_warps, num_stages=4 if block_m == 16 else 3,
    )  # fmt: skip
