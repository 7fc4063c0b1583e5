"""Ops on states and beside them: checks, and then one call into C++."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.tensors import (
    DTYPES,
    address_of,
    check_indices,
    describe,
    dtype_of,
    lengths_of,
    rows_of,
    state_layout,
)
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.kernels.torch_ops import convolution as torch_ops
from sapwood.kernels.torch_ops import state_space

GatedNormTuple = tuple[int, int, float, bool, bool]
DeltaTuple = tuple[int, int, int, int, bool, int, int, float, float, float]
StatesTuple = tuple[int, int, int, int]
ScanTuple = tuple[int, int, int, int, bool, int, int, int, float, float]


def causal_conv(
    context: _native.Context,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
    *,
    silu: bool,
) -> Tensor:
    """As Kernels.causal_conv; rows of x may lie apart."""
    if not 2 <= weight.shape[-1] <= _native.MAX_CONV_LENGTH:
        return torch_ops.causal_conv(x, weight, bias, states, slots, batch, silu=silu)
    each = weight.dim() == 3
    if each and (weight.shape[0] != x.shape[0] or not weight.is_contiguous()):
        raise ValueError(f"weights {describe(weight)} of each token do not fit x {describe(x)}")
    shared = weight.new_empty(weight.shape[1:]) if each else weight
    layout, dtype = state_layout(states, shared, bias, x), dtype_of(x)
    query_start, context_len, num_requests = lengths_of(batch)
    check_indices(slots, "slots", num_requests)
    num_tokens, width = x.shape
    if width != layout.channels:
        raise ValueError(f"x {describe(x)} must have {layout.channels} channels")
    x = _with_whole_rows(x)
    out = x.new_empty(num_tokens, width)
    _native.causal_conv(
        context, dtype, x.data_ptr(), weight.data_ptr(), weight.stride(0) if each else 0,
        address_of(bias, x, width, "bias"),
        states.data_ptr(), layout.state_stride, layout.num_slots, slots.data_ptr(), query_start,
        context_len, num_requests, num_tokens, width, layout.length, x.stride(0), silu,
        out.data_ptr(),
    )  # fmt: skip
    return out


def gate_columns(context: _native.Context, x: Tensor, gate: Tensor) -> None:
    """As Kernels.gate_columns."""
    if gate.shape != x.shape or gate.dtype != x.dtype or not x.is_contiguous():
        raise ValueError(f"gate {describe(gate)} does not fit x {describe(x)}, or x has gaps")
    gate, (rows, width) = _with_whole_rows(gate), x.shape
    _native.gate_columns(
        context, dtype_of(x), x.data_ptr(), gate.data_ptr(), gate.stride(0), rows, width
    )


def gated_rms_norm(
    context: _native.Context, x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm
) -> Tensor:
    """As Kernels.gated_rms_norm."""
    rows, width = rows_of(x, weight)
    if gate.shape != x.shape or gate.dtype != x.dtype:
        raise ValueError(f"gate {describe(gate)} does not fit x {describe(x)}")
    x, gate = x.contiguous(), _with_whole_rows(gate)
    out = torch.empty_like(x)
    _native.gated_rms_norm(
        context, dtype_of(x), x.data_ptr(), gate.data_ptr(), gate.stride(0), weight.data_ptr(),
        rows, gated_norm_tuple(form, width), out.data_ptr(),
    )  # fmt: skip
    return out


def gated_norm_tuple(form: GatedNormForm, width: int) -> GatedNormTuple:
    """What the compiled module takes; ValueError if the groups do not fill the width."""
    if width % form.group:
        raise ValueError(f"{width} columns are no groups of {form.group}")
    return width, form.group, form.eps, form.norm_first, form.logistic


def gated_delta_rule(
    context: _native.Context,
    qkv: Tensor,
    decay: Tensor,
    write: Tensor,
    form: DeltaForm,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
) -> Tensor:
    """As Kernels.gated_delta_rule."""
    dtype, num_tokens = dtype_of(qkv), qkv.shape[0]
    query_start, context_len, num_requests = lengths_of(batch)
    check_indices(slots, "slots", num_requests)
    widths = (form.num_channels, form.shift.shape[0], form.num_heads)
    qkv, decay, write = (_with_whole_rows(x) for x in (qkv, decay, write))
    for x, width, name in zip((qkv, decay, write), widths, ("qkv", "decay", "write"), strict=True):
        if x.shape != (num_tokens, width) or x.dtype != qkv.dtype:
            raise ValueError(f"{name} {describe(x)} must be [{num_tokens}, {width}] of {qkv.dtype}")
    out = qkv.new_empty(num_tokens, form.out_size)
    _native.gated_delta_rule(
        context, dtype, (qkv.data_ptr(), 0, qkv.stride(0)),
        (decay.data_ptr(), 0, decay.stride(0)), (write.data_ptr(), 0, write.stride(0)),
        delta_tuple(form),
        states_tuple(states, (form.num_heads, form.key_dim, form.value_dim)), slots.data_ptr(),
        query_start, context_len, num_requests, num_tokens, out.data_ptr(),
    )  # fmt: skip
    return out


def delta_tuple(form: DeltaForm) -> DeltaTuple:
    """What the compiled module takes; the caller keeps the form alive."""
    for name, tensor in (("rate", form.rate), ("shift", form.shift)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(f"{name} {describe(tensor)} must be float32, contiguous, on a CPU")
    return (
        form.num_key_heads, form.num_heads, form.key_dim, form.value_dim, form.is_per_channel,
        form.rate.data_ptr(), form.shift.data_ptr(), form.write_scale, form.eps,
        form.lowest or 0.0,
    )  # fmt: skip


def selective_scan(
    context: _native.Context,
    x: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor | None,
    layer: StateSpace,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
    *,
    gate: Tensor | None,
) -> Tensor:
    """As Kernels.selective_scan."""
    if layer.state_size > _native.MAX_STATE_SIZE:
        return state_space.selective_scan(x, b, c, dt, layer, states, slots, batch, gate=gate)
    layer.check(x, b, c, dt, gate)
    query_start, context_len, num_requests = lengths_of(batch)
    check_indices(slots, "slots", num_requests)
    inputs = [None if part is None else _with_whole_rows(part) for part in (x, b, c, dt, gate)]
    out = x.new_empty(x.shape)
    _native.scan(
        context, dtype_of(x),
        [(0, 0, 0) if part is None else (part.data_ptr(), 0, part.stride(0)) for part in inputs],
        scan_tuple(layer), states_tuple(states, layer.shape), slots.data_ptr(), query_start,
        context_len, num_requests, x.shape[0], out.data_ptr(),
    )  # fmt: skip
    return out


def scan_tuple(layer: StateSpace) -> ScanTuple:
    """What the compiled module takes; the caller keeps the layer alive."""
    addresses = []
    for tensor in (layer.rates, layer.dt_bias, layer.skip):
        if tensor is not None and not (tensor.is_contiguous() and tensor.is_cpu):
            raise ValueError(f"{describe(tensor)} must be contiguous and on a CPU")
        addresses.append(0 if tensor is None else tensor.data_ptr())
    rates, dt_bias, skip = addresses
    return (
        layer.num_heads, layer.head_dim, layer.num_groups, layer.state_size, layer.has_own_rates,
        rates, dt_bias, skip, *layer.dt_range,
    )  # fmt: skip


def states_tuple(states: Tensor, shape: tuple[int, ...]) -> StatesTuple:
    """(address, dtype, elements between slots, slots) of states of that shape each, which lie in
    one piece; slots may lie apart. ValueError if they do not fit."""
    is_fitting = states.shape[1:] == shape and states.dtype in DTYPES and states.is_cpu
    if not is_fitting or (len(states) and not states[0].is_contiguous()):
        raise ValueError(
            f"states {describe(states)} with strides {list(states.stride())} must be [slots, "
            f"{', '.join(map(str, shape))}] in float32 or bfloat16, each slot contiguous"
        )
    return states.data_ptr(), DTYPES[states.dtype], states.stride(0), states.shape[0]


def _with_whole_rows(x: Tensor) -> Tensor:
    """The same, in a layout whose rows have no gaps."""
    return x if x.stride(1) == 1 else x.contiguous()
