"""The gated delta rule with torch: decodes all at once, prompts in chunks of matrix products.

Source of the chunks: Yang et al. 2024, arXiv:2406.06484 and arXiv:2412.06464."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_forms import DeltaForm

_CHUNK, _CHUNK_PER_CHANNEL = 64, 16
"""Tokens. With a decay per channel, each pair of a chunk's tokens has a factor for each channel."""


def gated_delta_rule(
    qkv: Tensor,
    decay: Tensor,
    write: Tensor,
    form: DeltaForm,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
) -> Tensor:
    """As Kernels.gated_delta_rule. Reads no tensor on the host."""
    q, k, v = _heads(qkv, form)
    moved = (decay.float() + form.shift).view(len(qkv), form.num_heads, -1)
    rate = form.rate[:, None]  # moved and logs are [T, H, 1 or key_dim]
    if form.lowest is None:
        logs = -rate * F.softplus(moved)
    else:
        logs = form.lowest * torch.sigmoid(rate * moved)
    writes = form.write_scale * torch.sigmoid(write.float())
    num_new = batch.query_start[1:] - batch.query_start[:-1]
    begins = (batch.context_len == num_new).view(-1, 1, 1, 1)
    state = states.index_select(0, slots).float().masked_fill(begins, 0.0)
    out = v.new_zeros(qkv.shape[0], form.num_heads, form.value_dim)
    first = batch.num_decodes
    if first:
        own = slice(0, first)
        state[own], out[own] = _step(q[own], k[own], v[own], logs[own], writes[own], state[own])
    size = _CHUNK if logs.shape[2] == 1 else _CHUNK_PER_CHANNEL
    start = first
    for request, length in enumerate(batch.query_lens[first:], start=first):
        for begin in range(start, start + length, size):
            own = slice(begin, min(begin + size, start + length))
            state[request], out[own] = _chunk(
                q[own].transpose(0, 1),
                k[own].transpose(0, 1),
                v[own].transpose(0, 1),
                logs[own].transpose(0, 1),
                writes[own].T,
                state[request],
            )
        start += length
    states.index_copy_(0, slots, state.to(states.dtype))
    return out.flatten(1).to(qkv.dtype)


def _heads(qkv: Tensor, form: DeltaForm) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), each [T, H, its size] fp32; q and k of length 1, and q divided by a root."""
    size = form.num_key_heads * form.key_dim
    q, k, v = qkv.float().tensor_split((size, 2 * size), dim=-1)
    repeats = form.num_heads // form.num_key_heads
    q, k = (
        _of_length_1(x.reshape(len(qkv), -1, form.key_dim), form.eps).repeat_interleave(
            repeats, dim=1
        )
        for x in (q, k)
    )
    return q * form.key_dim**-0.5, k, v.reshape(len(qkv), -1, form.value_dim)


def _of_length_1(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


def _step(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, writes: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each of n requests: q, k, v [n, H, size], state [n, H, key_dim, value_dim] ->
    (state, out [n, H, value_dim])"""
    state = state * logs.exp().unsqueeze(-1)
    answer = torch.einsum("nhk,nhkv->nhv", k, state)
    state = state + k.unsqueeze(-1) * (writes.unsqueeze(-1) * (v - answer)).unsqueeze(-2)
    return state, torch.einsum("nhk,nhkv->nhv", q, state)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, writes: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """C tokens of one request: q, k, v [H, C, size], state [H, key_dim, value_dim] -> (state,
    out [C, H, value_dim]).

    What token i writes, u_i, depends on what the tokens before it wrote; all of them together solve
    a triangular system, whose entries are the products of keys, decayed from j to i."""
    total = logs.cumsum(dim=1)  # [H, C, 1 or key_dim]: from the chunk's begin up to token i
    keys = torch.tril(_decayed_products(k, k, total), diagonal=-1)
    system = writes.unsqueeze(-1) * keys
    wanted = writes.unsqueeze(-1) * (v - (k * total.exp()) @ state)
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = (q * total.exp()) @ state + torch.tril(_decayed_products(q, k, total)) @ written
    last = total[:, -1:]
    kept = (k * (last - total).exp()).transpose(1, 2) @ written
    return state * last.transpose(1, 2).exp() + kept, out.transpose(0, 1)


def _decayed_products(x: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """[H, C, C]: of x_i and k_j, decayed from j to i; entries above the diagonal are finite."""
    between = (total.unsqueeze(2) - total.unsqueeze(1)).clamp(max=0.0).exp()
    if total.shape[2] == 1:
        return (x @ k.transpose(1, 2)) * between.squeeze(3)
    return torch.einsum("hik,hjk,hijk->hij", x, k, between)
