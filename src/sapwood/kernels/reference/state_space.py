"""State space layers, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_space import StateSpace


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
    """As Kernels.selective_scan."""
    layer.check(x, b, c, dt, gate)
    out = torch.empty_like(x)
    heads_of_group = layer.num_heads // layer.num_groups
    start = 0
    for request, (num_new, length) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        slot = int(slots[request])
        for head in range(layer.num_heads):
            state = states[slot, head].float()
            if num_new == length:
                state = torch.zeros_like(state)
            channels = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
            first = head // heads_of_group * layer.state_size
            group = slice(first, first + layer.state_size)
            steps_of = channels if layer.has_own_rates else slice(head, head + 1)
            for token in range(start, start + num_new):
                value, decay = x[token, channels].float(), layer.rates[head].exp()
                if dt is not None and layer.dt_bias is not None:
                    raw = dt[token, steps_of].float() + layer.dt_bias[steps_of]
                    step = torch.log1p(raw.exp()).where(raw < 20, raw).clamp(*layer.dt_range)
                    value, decay = value * step, (layer.rates[head] * step).exp()
                state = state * decay + b[token, group].float().view(-1, 1) * value
                mixed = c[token, group].float() @ state
                if layer.skip is not None:
                    mixed = mixed + layer.skip[steps_of] * x[token, channels].float()
                if gate is not None:
                    logits = gate[token, channels].float()
                    mixed = mixed * logits / (1.0 + (-logits).exp())
                out[token, channels] = mixed.to(x.dtype)
            states[slot, head] = state.to(states.dtype)
        start += num_new
    return out
