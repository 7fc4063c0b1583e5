"""The gated delta rule: decodes here, prompts in chunks (delta_chunks.py). A program walks through
a request's tokens with some columns of a head's state in registers.

The columns of a state do not know of each other, so programs share nothing. Lengths are read on
the device, so a captured step stays right for other requests. Errors against the reference: 1e-5
in fp32, one rounding in the others."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_forms import DeltaForm
from sapwood.kernels.triton.delta_chunks import scan_in_chunks

_STATE_ENTRIES = 4096
"""Of a state in the registers of one program."""


@triton.jit
def _scan(
    qkv_ptr,
    decay_ptr,
    write_ptr,
    rate_ptr,
    shift_ptr,
    states_ptr,
    slots_ptr,
    query_start_ptr,
    context_len_ptr,
    out_ptr,
    qkv_stride,
    decay_stride,
    write_stride,
    state_stride,
    num_heads,
    repeats,
    write_scale,
    root,
    eps,
    lowest,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
):
    """KEYS is KEY_DIM rounded up to a power of 2, COLUMNS a part of VALUE_DIM."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = tl.arange(0, KEYS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_key, is_column = key < KEY_DIM, column < VALUE_DIM
    inside = is_key[:, None] & is_column[None, :]
    start = tl.load(query_start_ptr + request)
    end = tl.load(query_start_ptr + request + 1)
    # Of each entry, though all are alike: the interpreter takes no single numbers in masks.
    has_past = tl.zeros((KEYS, COLUMNS), dtype=tl.int32) + tl.load(context_len_ptr + request)
    has_past = has_past > end - start
    at = states_ptr + tl.load(slots_ptr + request) * state_stride + head * KEY_DIM * VALUE_DIM
    at += key[:, None] * VALUE_DIM + column[None, :]
    state = tl.load(at, mask=inside & has_past, other=0.0).to(tl.float32)
    num_keys = num_heads // repeats * KEY_DIM
    rate = tl.load(rate_ptr + head)
    if PER_CHANNEL:
        shift = tl.load(shift_ptr + head * KEY_DIM + key, mask=is_key, other=0.0)
    else:
        shift = tl.load(shift_ptr + head + key * 0)
    first = start.to(tl.int64)
    for index in range(end - start):
        row = first + index
        of_q = qkv_ptr + row * qkv_stride + head // repeats * KEY_DIM + key
        q = tl.load(of_q, mask=is_key, other=0.0).to(tl.float32)
        k = tl.load(of_q + num_keys, mask=is_key, other=0.0).to(tl.float32)
        of_v = qkv_ptr + row * qkv_stride + 2 * num_keys + head * VALUE_DIM + column
        v = tl.load(of_v, mask=is_column, other=0.0).to(tl.float32)
        q = q * tl.rsqrt(tl.sum(q * q, axis=0) + eps) * root
        k = k * tl.rsqrt(tl.sum(k * k, axis=0) + eps)
        if PER_CHANNEL:
            of_decay = decay_ptr + row * decay_stride + head * KEY_DIM + key
            x = tl.load(of_decay, mask=is_key, other=0.0).to(tl.float32)
        else:
            x = tl.load(decay_ptr + row * decay_stride + head + key * 0).to(tl.float32)
        x += shift
        if IS_BOUNDED:
            logs = lowest * tl.sigmoid(rate * x)
        else:  # log(1 + e^x) without an overflow
            logs = -rate * (tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))))
        write = tl.load(write_ptr + row * write_stride + head).to(tl.float32)
        share = write_scale * tl.sigmoid(write)
        state = state * tl.exp(logs)[:, None]
        wrong = v - tl.sum(k[:, None] * state, axis=0)
        state += k[:, None] * (share * wrong)[None, :]
        out = tl.sum(q[:, None] * state, axis=0).to(out_ptr.dtype.element_ty)
        to = out_ptr + (row * num_heads + head) * VALUE_DIM + column
        tl.store(to, out, mask=is_column)
    tl.store(at, state.to(states_ptr.dtype.element_ty), mask=inside)


def gated_delta_rule(
    qkv: Tensor,
    decay: Tensor,
    write: Tensor,
    form: DeltaForm,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
) -> Tensor:
    """As Kernels.gated_delta_rule; slots may lie apart. Reads no tensor on the host."""
    qkv, decay, write = (x if x.stride(1) == 1 else x.contiguous() for x in (qkv, decay, write))
    # Tokens that belong to no request (a captured step's padding) get zeros.
    out = torch.zeros((qkv.shape[0], form.out_size), dtype=qkv.dtype, device=qkv.device)
    keys = triton.next_power_of_2(form.key_dim)
    columns = min(triton.next_power_of_2(form.value_dim), max(_STATE_ENTRIES // keys, 1))
    if batch.num_decodes < len(slots):
        scan_in_chunks(
            qkv, decay, write, form, states, slots, batch, out, first_request=batch.num_decodes
        )
    if batch.num_decodes == 0:
        return out
    grid = (batch.num_decodes, form.num_heads, triton.cdiv(form.value_dim, columns))
    _scan[grid](
        qkv, decay, write, form.rate, form.shift, states, slots, batch.query_start,
        batch.context_len, out, qkv.stride(0), decay.stride(0), write.stride(0), states.stride(0),
        form.num_heads, form.num_heads // form.num_key_heads, form.write_scale,
        form.key_dim**-0.5, form.eps, form.lowest or 0.0, KEY_DIM=form.key_dim,
        VALUE_DIM=form.value_dim, KEYS=keys, COLUMNS=columns, PER_CHANNEL=form.is_per_channel,
        IS_BOUNDED=form.lowest is not None,
    )  # fmt: skip
    return out
