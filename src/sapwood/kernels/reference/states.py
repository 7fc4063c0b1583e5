"""Gated norms and the gated delta rule, written to be read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm) -> Tensor:
    """As Kernels.gated_rms_norm."""
    if x.shape[1] % form.group:
        raise ValueError(f"{x.shape[1]} columns are no groups of {form.group}")
    out = torch.empty_like(x)
    for row, gates, to in zip(x.float(), gate.float(), out, strict=True):
        factor = torch.sigmoid(gates) if form.logistic else gates * torch.sigmoid(gates)
        for first in range(0, len(row), form.group):
            own = slice(first, first + form.group)
            group = row[own] if form.norm_first else row[own] * factor[own]
            rms = torch.sqrt((group * group).mean() + form.eps)
            normed = group / rms * weight[own].float()
            to[own] = normed * factor[own] if form.norm_first else normed
    return out


def gated_delta_rule(
    qkv: Tensor,
    decay: Tensor,
    write: Tensor,
    form: DeltaForm,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
) -> Tensor:
    """As Kernels.gated_delta_rule, token by token and head by head."""
    out = qkv.new_empty(qkv.shape[0], form.num_heads, form.value_dim)
    repeats, size = form.num_heads // form.num_key_heads, form.num_key_heads * form.key_dim
    start = 0
    for request, (num_new, length) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        slot = int(slots[request])
        state = torch.zeros_like(states[slot]) if num_new == length else states[slot]
        state = state.float()
        for token in range(start, start + num_new):
            q, k, v = qkv[token].float().tensor_split((size, 2 * size))
            for head in range(form.num_heads):
                key_head = head // repeats
                query = _of_length_1(q.view(-1, form.key_dim)[key_head], form.eps)
                key = _of_length_1(k.view(-1, form.key_dim)[key_head], form.eps)
                channels = slice(head * form.key_dim, (head + 1) * form.key_dim)
                own = channels if form.is_per_channel else slice(head, head + 1)
                moved, rate = decay[token, own].float() + form.shift[own], form.rate[head]
                if form.lowest is None:
                    log = -rate * torch.log1p(torch.exp(moved))
                else:
                    log = form.lowest / (1 + torch.exp(-rate * moved))
                kept = torch.exp(log)[:, None] * state[head]
                share = form.write_scale * torch.sigmoid(write[token, head].float())
                wrong = v.view(-1, form.value_dim)[head] - key @ kept
                state[head] = kept + torch.outer(key, share * wrong)
                out[token, head] = query @ state[head] / math.sqrt(form.key_dim)
        states[slot] = state.to(states.dtype)
        start += num_new
    return out.flatten(1)


def _of_length_1(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum() + eps)
