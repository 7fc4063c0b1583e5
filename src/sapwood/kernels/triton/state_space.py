"""State space layers: a program has some channels of a head over all new tokens of a request, one
after the other: decodes, and prompts of Mamba 1. Other prompts are computed in chunks.

Errors against the reference: 1e-4 in fp32, one rounding in the others.
Sources: as Kernels.selective_scan."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_space import StateSpace
from sapwood.kernels.triton.state_chunks import scan_in_chunks

_CHANNELS = 32
"""Of one program, at most."""


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _scan(
    x_ptr,
    b_ptr,
    c_ptr,
    dt_ptr,
    gate_ptr,
    rates_ptr,
    dt_bias_ptr,
    skip_ptr,
    states_ptr,
    slots_ptr,
    query_start_ptr,
    context_len_ptr,
    out_ptr,
    x_stride,
    b_stride,
    c_stride,
    dt_stride,
    gate_stride,
    state_stride,
    num_heads,
    heads_of_group,
    head_dim,
    state_size,
    least,
    most,
    OWN_RATES: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """SIZE: the state size, rounded up to a power of two. dt, gate and skip may be None."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, SIZE)
    is_channel, is_row = channel < head_dim, row < state_size
    inside = is_row[:, None] & is_channel[None, :]
    start = tl.load(query_start_ptr + request)
    end = tl.load(query_start_ptr + request + 1)
    has_past = tl.load(context_len_ptr + request) > end - start
    slot = tl.load(slots_ptr + request)
    entry = (head * state_size + row)[:, None] * head_dim + channel[None, :]
    of_state = states_ptr + slot * state_stride + entry
    state = tl.load(of_state, mask=inside, other=0.0).to(tl.float32)
    # A request without a past finds another one's state, which may be NaN.
    state = tl.where(tl.full((SIZE, CHANNELS), has_past, tl.int1), state, 0.0)
    key = head // heads_of_group * state_size + row
    place = head * head_dim + channel
    step_at = place if OWN_RATES else head + tl.zeros((CHANNELS,), dtype=tl.int32)
    if OWN_RATES:
        rates = tl.load(rates_ptr + entry, mask=inside, other=0.0)
    else:
        rates = tl.load(rates_ptr + head) + tl.zeros((SIZE, CHANNELS), dtype=tl.float32)
    decay = tl.exp(rates)
    if dt_ptr is not None:
        bias = tl.load(dt_bias_ptr + step_at, mask=is_channel, other=0.0)
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + step_at, mask=is_channel, other=0.0)
    first = start.to(tl.int64)
    x_at = x_ptr + first * x_stride + place
    b_at, c_at = b_ptr + first * b_stride + key, c_ptr + first * c_stride + key
    out_at = out_ptr + first * num_heads * head_dim + place
    if dt_ptr is not None:
        dt_at = dt_ptr + first * dt_stride + step_at
    if gate_ptr is not None:
        gate_at = gate_ptr + first * gate_stride + place
    for _ in range(start, end):
        value = tl.load(x_at, mask=is_channel, other=0.0).to(tl.float32)
        fed = value
        if dt_ptr is not None:
            raw = tl.load(dt_at, mask=is_channel, other=0.0)
            step = _softplus(raw.to(tl.float32) + bias)
            step = tl.minimum(tl.maximum(step, least), most)
            fed = value * step
            decay = tl.exp(rates * step[None, :])
            dt_at += dt_stride
        b = tl.load(b_at, mask=is_row, other=0.0).to(tl.float32)
        c = tl.load(c_at, mask=is_row, other=0.0).to(tl.float32)
        state = state * decay + b[:, None] * fed[None, :]
        mixed = tl.sum(c[:, None] * state, axis=0)
        if skip_ptr is not None:
            mixed += skip * value
        if gate_ptr is not None:
            gate = tl.load(gate_at, mask=is_channel, other=0.0).to(tl.float32)
            mixed *= gate / (1.0 + tl.exp(-gate))
            gate_at += gate_stride
        tl.store(out_at, mixed.to(out_ptr.dtype.element_ty), mask=is_channel)
        x_at += x_stride
        b_at += b_stride
        c_at += c_stride
        out_at += num_heads * head_dim
    tl.store(of_state, state.to(states_ptr.dtype.element_ty), mask=inside)


def selective_scan(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor | None,
    layer: StateSpace,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
    *,
    gate: Tensor | None = None,
) -> Tensor:
    """As Kernels.selective_scan. Reads no tensor on the host."""
    layer.check(x, b, c, dt, gate)
    x, b, c = (part if part.stride(1) == 1 else part.contiguous() for part in (x, b, c))
    dt, gate = (
        part if part is None or part.stride(1) == 1 else part.contiguous() for part in (dt, gate)
    )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels = min(_CHANNELS, triton.next_power_of_2(layer.head_dim))
    num_stepped = len(slots) if layer.has_own_rates else batch.num_decodes
    if num_stepped < len(slots):
        scan_in_chunks(
            x, b, c, dt, gate, layer, states, slots, batch, out, first_request=num_stepped
        )
    if num_stepped == 0:
        return out
    grid = (num_stepped, layer.num_heads, triton.cdiv(layer.head_dim, channels))
    strides = [0 if part is None else part.stride(0) for part in (x, b, c, dt, gate)]
    _scan[grid](
        x, b, c, dt, gate, layer.rates, layer.dt_bias, layer.skip, states, slots,
        batch.query_start, batch.context_len, out, *strides, states.stride(0), layer.num_heads,
        layer.num_heads // layer.num_groups, layer.head_dim, layer.state_size, *layer.dt_range,
        OWN_RATES=layer.has_own_rates, SIZE=triton.next_power_of_2(layer.state_size),
        CHANNELS=channels,
    )  # fmt: skip
    return out
