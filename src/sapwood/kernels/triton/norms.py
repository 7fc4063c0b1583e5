"""RMSNorm, alone and together with the sum before it, and LayerNorm.

Errors against the reference, of the largest entry: 1e-5 in fp32, one rounding in the others."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.state_forms import GatedNormForm


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm of one row. With a residual, the norm is that of x + residual, which is stored there."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * residual_stride + column
        total = x + tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, rounded, mask=inside)
        x = rounded.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = (x * inverse_rms * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, out, mask=inside)


@triton.jit
def _layer_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    """Norm of one row; weight and bias may be None."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    away = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    out = away * tl.rsqrt(tl.sum(away * away, axis=0) / width + eps)
    if weight_ptr is not None:
        out = out * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out = out + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_rms_norm(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    gate_stride,
    width,
    group,
    eps,
    NORM_FIRST: tl.constexpr,
    LOGISTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < group
    column = tl.program_id(1) * group + index
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.sigmoid(gate)
    if not LOGISTIC:
        factor = gate * factor
    if not NORM_FIRST:
        x = x * factor
    out = x * tl.rsqrt(tl.sum(x * x, axis=0) / group + eps)
    out = out * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if NORM_FIRST:
        out = out * factor
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm) -> Tensor:
    """As Kernels.gated_rms_norm."""
    x = x if x.stride(1) == 1 else x.contiguous()
    gate = gate if gate.stride(1) == 1 else gate.contiguous()
    rows, width = x.shape
    if width % form.group:
        raise ValueError(f"{width} columns are no groups of {form.group}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(form.group)
    _gated_rms_norm[(rows, width // form.group)](
        x, gate, weight, out, x.stride(0), gate.stride(0), width, form.group, form.eps,
        NORM_FIRST=form.norm_first, LOGISTIC=form.logistic, BLOCK=block,
        num_warps=min(32, max(1, block // 512)),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As Kernels.rms_norm."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As Kernels.add_rms_norm; `residual` is overwritten with the sum."""
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual.stride(1) == 1 else residual.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, out, eps)
    return out, residual


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As Kernels.layer_norm."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    num_warps = min(32, max(1, block // 512))
    _layer_norm[(rows,)](
        x, weight, bias, out, x.stride(0), width, eps, BLOCK=block, num_warps=num_warps
    )
    return out


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        width,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(32, max(1, block // 512)),
    )
