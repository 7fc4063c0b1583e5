"""The gated delta rule over prompts: a program walks through a request's tokens chunk by chunk,
with some columns of a head's state in registers.

What the tokens of a chunk write depends on what those before them wrote, and all of it together
solves a triangular system, row by row; everything else of a chunk is products of matrices. Tensor
cores compute these: with 10 bits of mantissa for 16-bit activations, and exactly for fp32.
Source: Yang et al. 2024, arXiv:2406.06484 and arXiv:2412.06464."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_forms import DeltaForm

CHUNK = 16
"""Tokens: the least that a product of matrices takes."""
_STATE_ENTRIES = 8192
"""Of a state in the registers of one program."""


@triton.jit
def _delta_chunks(
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
    first_request,
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
    SIZE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """KEYS is KEY_DIM rounded up to a power of 2, COLUMNS a part of VALUE_DIM, SIZE tokens make a
    chunk."""
    request, head = first_request + tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = tl.arange(0, KEYS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, SIZE)
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
    is_before = token[:, None] > token[None, :]
    first = start.to(tl.int64)
    for begin in range(0, end - start, SIZE):
        is_token = begin + token < end - start
        row = first + begin + token
        of_q = qkv_ptr + row[:, None] * qkv_stride + head // repeats * KEY_DIM + key[None, :]
        keys_there = is_token[:, None] & is_key[None, :]
        q = tl.load(of_q, mask=keys_there, other=0.0).to(tl.float32)
        k = tl.load(of_q + num_keys, mask=keys_there, other=0.0).to(tl.float32)
        q = q * (tl.rsqrt(tl.sum(q * q, axis=1) + eps) * root)[:, None]
        k = k * tl.rsqrt(tl.sum(k * k, axis=1) + eps)[:, None]
        of_v = qkv_ptr + row[:, None] * qkv_stride + 2 * num_keys + head * VALUE_DIM
        of_v += column[None, :]
        values_there = is_token[:, None] & is_column[None, :]
        v = tl.load(of_v, mask=values_there, other=0.0).to(tl.float32)
        write = tl.load(write_ptr + row * write_stride + head, mask=is_token, other=0.0)
        share = write_scale * tl.sigmoid(write.to(tl.float32))
        if PER_CHANNEL:
            of_decay = decay_ptr + row[:, None] * decay_stride + head * KEY_DIM + key[None, :]
            x = tl.load(of_decay, mask=keys_there, other=0.0).to(tl.float32)
        else:
            of_decay = decay_ptr + row * decay_stride + head
            x = tl.load(of_decay, mask=is_token, other=0.0).to(tl.float32)[:, None]
            x += tl.zeros((SIZE, KEYS), dtype=tl.float32)
        x += shift[None, :]
        if IS_BOUNDED:
            logs = lowest * tl.sigmoid(rate * x)
        else:  # log(1 + e^x) without an overflow
            logs = -rate * (tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))))
        # After the last token nothing decays.
        logs = tl.where(is_token[:, None], logs, 0.0)
        total = tl.cumsum(logs, axis=0)
        last = tl.sum(logs, axis=0)
        # Products of tokens i and j, decayed from j to i.
        of_keys = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        of_queries = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        if PER_CHANNEL:
            for j in range(SIZE):
                is_j = token == j
                k_j = tl.sum(tl.where(is_j[:, None], k, 0.0), axis=0)
                total_j = tl.sum(tl.where(is_j[:, None], total, 0.0), axis=0)
                decayed = k_j[None, :] * tl.exp(tl.minimum(total - total_j[None, :], 0.0))
                products = tl.sum(k * decayed, axis=1)[:, None]
                of_keys = tl.where(is_j[None, :], products, of_keys)
                products = tl.sum(q * decayed, axis=1)[:, None]
                of_queries = tl.where(is_j[None, :], products, of_queries)
        else:
            of_head = tl.sum(tl.where(key[None, :] == 0, total, 0.0), axis=1)
            between = tl.exp(tl.minimum(of_head[:, None] - of_head[None, :], 0.0))
            of_keys = tl.dot(k, tl.trans(k), input_precision=PRECISION) * between
            of_queries = tl.dot(q, tl.trans(k), input_precision=PRECISION) * between
        since = tl.exp(total)
        answer = tl.dot(k * since, state, input_precision=PRECISION)
        written = share[:, None] * (v - answer)
        system = tl.where(is_before, share[:, None] * of_keys, 0.0)
        for i in range(1, SIZE):
            is_i = (token == i)[:, None]
            line = tl.sum(tl.where(is_i, system, 0.0), axis=0)
            known = tl.sum(line[:, None] * written, axis=0)
            written = tl.where(is_i, written - known[None, :], written)
        seen = tl.where(token[:, None] >= token[None, :], of_queries, 0.0)
        out = tl.dot(q * since, state, input_precision=PRECISION)
        out += tl.dot(seen, written, input_precision=PRECISION)
        to = out_ptr + (row[:, None] * num_heads + head) * VALUE_DIM + column[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=values_there)
        until = k * tl.exp(last[None, :] - total)
        kept = tl.dot(tl.trans(until), written, input_precision=PRECISION)
        state = state * tl.exp(last)[:, None] + kept
    tl.store(at, state.to(states_ptr.dtype.element_ty), mask=inside)


def scan_in_chunks(
    qkv: Tensor,
    decay: Tensor,
    write: Tensor,
    form: DeltaForm,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
    out: Tensor,
    *,
    first_request: int,
) -> None:
    """As Kernels.gated_delta_rule, for the requests from `first_request` on, into `out`. Entries of
    a row lie together."""
    keys = max(16, triton.next_power_of_2(form.key_dim))
    columns = max(_STATE_ENTRIES // keys, 16)
    columns = min(max(16, triton.next_power_of_2(form.value_dim)), columns)
    grid = (len(slots) - first_request, form.num_heads, triton.cdiv(form.value_dim, columns))
    _delta_chunks[grid](
        qkv, decay, write, form.rate, form.shift, states, slots, batch.query_start,
        batch.context_len, out, qkv.stride(0), decay.stride(0), write.stride(0), states.stride(0),
        first_request, form.num_heads, form.num_heads // form.num_key_heads, form.write_scale,
        form.key_dim**-0.5, form.eps, form.lowest or 0.0, KEY_DIM=form.key_dim,
        VALUE_DIM=form.value_dim, KEYS=keys, COLUMNS=columns, SIZE=CHUNK,
        PER_CHANNEL=form.is_per_channel, IS_BOUNDED=form.lowest is not None,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", num_warps=8,
    )  # fmt: skip
