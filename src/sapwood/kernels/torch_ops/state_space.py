"""State space layers with torch: a recurrence over single tokens, and its form for many at once.

Source of the form for many: Dao and Gu 2024, arXiv:2405.21060."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_space import StateSpace

CHUNK = 64
"""Tokens whose outputs are products of matrices; the state goes from one chunk to the next."""


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
    """As Kernels.selective_scan. Computes in fp32."""
    layer.check(x, b, c, dt, gate)
    num_tokens, heads, size = x.shape[0], layer.num_heads, layer.head_dim
    inputs = x.view(num_tokens, heads, size).float()
    keys, queries = (
        part.reshape(num_tokens, layer.num_groups, 1, layer.state_size)
        .expand(-1, -1, heads // layer.num_groups, -1)
        .reshape(num_tokens, heads, layer.state_size)
        .float()
        for part in (b, c)
    )
    steps = time_steps(dt, layer)
    values = inputs if steps is None else inputs * steps
    num_new = batch.query_start[1:] - batch.query_start[:-1]
    begins = (batch.context_len == num_new).view(-1, 1, 1, 1)
    past = states.index_select(0, slots).float().masked_fill(begins, 0.0)
    out = torch.empty_like(values)
    rows = batch.num_decodes
    if rows:
        ends = _step(values[:rows], keys[:rows], queries[:rows], _of(steps, 0, rows), layer,
                     past[:rows], out[:rows])  # fmt: skip
        past[:rows] = ends
    start = rows
    for request in range(rows, len(batch.query_lens)):
        end = start + batch.query_lens[request]
        while start < end:
            stop = min(start + CHUNK, end)
            part = slice(start, stop)
            form = _token_by_token if layer.has_own_rates else _chunk
            past[request] = form(
                values[part], keys[part], queries[part], _of(steps, start, stop), layer,
                past[request], out[part],
            )  # fmt: skip
            start = stop
    states.index_copy_(0, slots, past.to(states.dtype))
    if layer.skip is not None:
        out += inputs * (layer.skip.view(heads, -1))
    found = out.view(num_tokens, layer.width)
    return (found if gate is None else found * F.silu(gate.float())).to(x.dtype)


def time_steps(dt: Tensor | None, layer: StateSpace) -> Tensor | None:
    """[T, H, 1], or [T, H, P] if each channel has its own; fp32."""
    if dt is None or layer.dt_bias is None:
        return None
    steps = F.softplus(dt.float() + layer.dt_bias).clamp_(*layer.dt_range)
    return steps.view(dt.shape[0], layer.num_heads, -1)


def _of(steps: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if steps is None else steps[start:stop]


def _step(
    values: Tensor,
    keys: Tensor,
    queries: Tensor,
    steps: Tensor | None,
    layer: StateSpace,
    past: Tensor,
    out: Tensor,
) -> Tensor:
    """One token each: values [R, H, P], keys and queries [R, H, N], past [R, H, N, P] -> the states
    after it; writes out [R, H, P]."""
    rates = layer.rates if layer.has_own_rates else layer.rates.view(-1, 1, 1)
    decay = rates.exp() if steps is None else (rates * steps.unsqueeze(2)).exp()
    after = past * decay + keys.unsqueeze(3) * values.unsqueeze(2)
    out.copy_((queries.unsqueeze(2) @ after).squeeze(2))
    return after


def _token_by_token(
    values: Tensor,
    keys: Tensor,
    queries: Tensor,
    steps: Tensor | None,
    layer: StateSpace,
    past: Tensor,
    out: Tensor,
) -> Tensor:
    """As _chunk."""
    state = past.unsqueeze(0)
    for token in range(len(values)):
        at = slice(token, token + 1)
        state = _step(values[at], keys[at], queries[at], _of(steps, token, token + 1), layer,
                      state, out[at])  # fmt: skip
    return state[0]


def _chunk(
    values: Tensor,
    keys: Tensor,
    queries: Tensor,
    steps: Tensor | None,
    layer: StateSpace,
    past: Tensor,
    out: Tensor,
) -> Tensor:
    """L tokens of one request: values [L, H, P], keys and queries [L, H, N], past [H, N, P] -> the
    state after them; writes out [L, H, P]."""
    length = len(values)
    logs = layer.rates.expand(length, -1) if steps is None else steps.squeeze(2) * layer.rates
    total = logs.cumsum(dim=0).T  # [H, L]: of the state before, what is left after each token
    values, keys, queries = (part.transpose(0, 1) for part in (values, keys, queries))
    between = total.unsqueeze(2) - total.unsqueeze(1)  # [H, L, L], of a token what is left later
    later = torch.ones(length, length, dtype=torch.bool, device=values.device).tril()
    weights = (queries @ keys.transpose(1, 2)) * between.masked_fill(~later, -torch.inf).exp()
    mixed = weights @ values + (queries @ past) * total.exp().unsqueeze(2)
    out.copy_(mixed.transpose(0, 1))
    left = (total[:, -1:] - total).exp().unsqueeze(2)
    return past * total[:, -1].exp().view(-1, 1, 1) + (keys * left).transpose(1, 2) @ values
