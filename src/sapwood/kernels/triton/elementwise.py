"""Activations, alone and of a gate, and the embedding's gather.

The gather is exact; activations are within 1e-5 (fp32), else one rounding of the reference."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.activations import Activation

_BLOCK = 1024


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """x fp32; the names are those of Activation."""
    if KIND == "silu":
        out = x * tl.sigmoid(x)
    elif KIND == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        out = x * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(y)) is sigmoid(2 y)
    elif KIND == "quick_gelu":
        out = x * tl.sigmoid(1.702 * x)
    else:
        out = tl.where(x < 0, 0.0, x)  # NaN stays
        if KIND == "relu2":
            out = out * out
    return out


@triton.jit
def _activate(x_ptr, out_ptr, width, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    out = _activated(x, KIND).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, out, mask=inside)


@triton.jit
def _activate_and_mul(x_ptr, out_ptr, width, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gates = x_ptr + row * x_stride + column
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + width, mask=inside, other=0.0).to(tl.float32)
    out = (_activated(gate, KIND) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, out, mask=inside)


@triton.jit
def _embedding(ids_ptr, weight_ptr, out_ptr, width, weight_stride, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    row = tl.load(ids_ptr + token).to(tl.int64)
    entries = tl.load(weight_ptr + row * weight_stride + column, mask=inside)
    tl.store(out_ptr + token * width + column, entries, mask=inside)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """As Kernels.activate."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    grid = (rows, triton.cdiv(width, _BLOCK))
    _activate[grid](x, out, width, x.stride(0), KIND=activation.value, BLOCK=_BLOCK)
    return out


def activate_and_mul(x: Tensor, activation: Activation) -> Tensor:
    """As Kernels.activate_and_mul."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    grid = (rows, triton.cdiv(width, _BLOCK))
    _activate_and_mul[grid](x, out, width, x.stride(0), KIND=activation.value, BLOCK=_BLOCK)
    return out


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """As Kernels.embedding."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, width = token_ids.shape[0], weight.shape[1]
    out = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    grid = (rows, triton.cdiv(width, _BLOCK))
    _embedding[grid](token_ids, weight, out, width, weight.stride(0), BLOCK=_BLOCK)
    return out
