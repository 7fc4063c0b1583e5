"""State space layers over prompts, with one decay per head (Mamba 2, lightning attention): a
program has some channels of a head, and walks through a request's tokens chunk by chunk.

A chunk's tokens see each other by a matrix of products, decayed from one to the other, and the
tokens before the chunk by the state. Tensor cores compute the products: with 10 bits of mantissa
for 16-bit activations, and exactly for fp32.
Source: Dao and Gu 2024, arXiv:2405.21060 (state space duality)."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_space import StateSpace

_CHUNK = 32
"""Tokens."""
_CHANNELS = 32
"""Of one program, at most."""


@triton.jit
def _state_chunks(
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
    first_request,
    num_heads,
    heads_of_group,
    head_dim,
    state_size,
    least,
    most,
    STATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """STATE: the state size, rounded up to a power of two; SIZE tokens make a chunk. dt, gate and
    skip may be None."""
    request, head = first_request + tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    entry, token = tl.arange(0, STATE), tl.arange(0, SIZE)
    is_channel, is_entry = channel < head_dim, entry < state_size
    inside = is_entry[:, None] & is_channel[None, :]
    start = tl.load(query_start_ptr + request)
    end = tl.load(query_start_ptr + request + 1)
    has_past = tl.load(context_len_ptr + request) > end - start
    slot = tl.load(slots_ptr + request)
    of_state = states_ptr + slot * state_stride
    of_state += (head * state_size + entry)[:, None] * head_dim + channel[None, :]
    state = tl.load(of_state, mask=inside, other=0.0).to(tl.float32)
    # A request without a past finds another one's state, which may be NaN.
    state = tl.where(tl.full((STATE, CHANNELS), has_past, tl.int1), state, 0.0)
    rate = tl.load(rates_ptr + head)
    key = head // heads_of_group * state_size + entry
    place = head * head_dim + channel
    first = start.to(tl.int64)
    for begin in range(0, end - start, SIZE):
        is_token = begin + token < end - start
        row = first + begin + token
        values_there = is_token[:, None] & is_channel[None, :]
        keys_there = is_token[:, None] & is_entry[None, :]
        at = row[:, None] * x_stride + place[None, :]
        value = tl.load(x_ptr + at, mask=values_there, other=0.0).to(tl.float32)
        at = row[:, None] * b_stride + key[None, :]
        b = tl.load(b_ptr + at, mask=keys_there, other=0.0).to(tl.float32)
        at = row[:, None] * c_stride + key[None, :]
        c = tl.load(c_ptr + at, mask=keys_there, other=0.0).to(tl.float32)
        # After the last token no time passes.
        step = tl.where(is_token, 1.0, 0.0)
        if dt_ptr is not None:
            raw = tl.load(dt_ptr + row * dt_stride + head, mask=is_token, other=0.0)
            raw = raw.to(tl.float32) + tl.load(dt_bias_ptr + head)
            # log(1 + e^x) without an overflow.
            passed = tl.maximum(raw, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(raw)))
            passed = tl.minimum(tl.maximum(passed, least), most)
            step = tl.where(is_token, passed, 0.0)
        fed = value * step[:, None]
        total = tl.cumsum(rate * step, axis=0)
        last = tl.sum(rate * step, axis=0)
        between = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))
        seen = tl.dot(c, tl.trans(b), input_precision=PRECISION) * between
        seen = tl.where(token[:, None] >= token[None, :], seen, 0.0)
        mixed = tl.dot(c * tl.exp(total)[:, None], state, input_precision=PRECISION)
        mixed += tl.dot(seen, fed, input_precision=PRECISION)
        until = b * tl.exp(last - total)[:, None]
        state = state * tl.exp(last) + tl.dot(tl.trans(until), fed, input_precision=PRECISION)
        if skip_ptr is not None:
            mixed += tl.load(skip_ptr + head) * value
        if gate_ptr is not None:
            at = row[:, None] * gate_stride + place[None, :]
            gate = tl.load(gate_ptr + at, mask=values_there, other=0.0).to(tl.float32)
            mixed *= gate / (1.0 + tl.exp(-gate))
        to = out_ptr + row[:, None] * num_heads * head_dim + place[None, :]
        tl.store(to, mixed.to(out_ptr.dtype.element_ty), mask=values_there)
    tl.store(of_state, state.to(states_ptr.dtype.element_ty), mask=inside)


def scan_in_chunks(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor | None,
    gate: Tensor | None,
    layer: StateSpace,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
    out: Tensor,
    *,
    first_request: int,
) -> None:
    """As Kernels.selective_scan, for the requests from `first_request` on, into `out`. The layer
    has one decay per head; entries of a row lie together."""
    channels = max(16, min(_CHANNELS, triton.next_power_of_2(layer.head_dim)))
    programs = triton.cdiv(layer.head_dim, channels)
    strides = [0 if part is None else part.stride(0) for part in (x, b, c, dt, gate)]
    _state_chunks[(len(slots) - first_request, layer.num_heads, programs)](
        x, b, c, dt, gate, layer.rates, layer.dt_bias, layer.skip, states, slots,
        batch.query_start, batch.context_len, out, *strides, states.stride(0), first_request,
        layer.num_heads, layer.num_heads // layer.num_groups, layer.head_dim, layer.state_size,
        *layer.dt_range, STATE=max(16, triton.next_power_of_2(layer.state_size)),
        CHANNELS=channels, SIZE=_CHUNK, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
