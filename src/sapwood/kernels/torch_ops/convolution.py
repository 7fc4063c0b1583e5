"""The short convolution over a request's tokens, with torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
    *,
    silu: bool = False,
) -> Tensor:
    """As Kernels.causal_conv. Reads no tensor on the host, so that a device need not be waited for.
    Products and sums are fp32."""
    num_new = batch.query_start[1:] - batch.query_start[:-1]
    begins = (batch.context_len == num_new).view(-1, 1, 1)
    past = states.index_select(0, slots).masked_fill(begins, 0.0)
    if batch.num_decodes == len(slots):
        inputs = torch.cat((past, x.unsqueeze(2).to(past.dtype)), dim=2)
        states.index_copy_(0, slots, inputs[:, :, 1:])
        out = (inputs.float() * weight.float()).sum(dim=2)
    else:
        out = _convolve_chunks(x, weight, past, states, slots, batch)
    out = out if bias is None else out + bias.float()
    return (F.silu(out) if silu else out).to(x.dtype)


def _convolve_chunks(
    x: Tensor,
    weight: Tensor,
    past: Tensor,
    states: Tensor,
    slots: Tensor,
    batch: AttentionBatch,
) -> Tensor:
    """[T, C] fp32, for any numbers of new tokens; also updates the states.

    The inputs of all requests lie one after the other, each request's past before its new ones:
    new token t of request r is row t + (r + 1) (L - 1)."""
    (num_tokens, width), num_requests, num_past = x.shape, len(slots), past.shape[2]
    device = x.device
    token = torch.arange(num_tokens, device=device)
    request = torch.searchsorted(batch.query_start[1:].long(), token, right=True)
    # Tokens that belong to no request (a captured step's padding) count as the last one's.
    first = token + request.clamp_(max=num_requests - 1) * num_past
    index = torch.arange(num_past, device=device)
    own = torch.arange(num_requests, device=device) * num_past
    begin = (batch.query_start[:-1] + own).unsqueeze(1) + index
    end = (batch.query_start[1:] + own).unsqueeze(1) + index
    inputs = past.new_empty(num_tokens + num_requests * num_past, width)
    inputs.index_copy_(0, begin.flatten(), past.transpose(1, 2).reshape(-1, width))
    inputs.index_copy_(0, first + num_past, x.to(past.dtype))
    newest = inputs.index_select(0, end.flatten()).view(num_requests, num_past, width)
    states.index_copy_(0, slots, newest.transpose(1, 2))
    out = torch.zeros(x.shape, dtype=torch.float32, device=device)
    for tap in range(num_past + 1):
        out.addcmul_(inputs.index_select(0, first + tap).float(), weight[..., tap].float())
    return out
