"""The short convolution over the tokens of requests: a kernel for outputs, and one for states.

Errors against the reference: 1e-5 in fp32, one rounding in the others; states are the same bits.
Source: Gu and Dao 2023, arXiv:2312.00752."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.torch_ops import convolution as torch_ops

_TOKENS, _CHANNELS = 8, 128
"""Of one program."""
_LONGEST = 16
"""Longer convolutions are torch's: these kernels have a piece of code for each factor."""


@triton.jit
def _outputs(
    x_ptr,
    weight_ptr,
    bias_ptr,
    states_ptr,
    slots_ptr,
    request_ptr,
    query_start_ptr,
    context_len_ptr,
    out_ptr,
    num_tokens,
    num_channels,
    x_stride,
    state_stride,
    LENGTH: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Each token reads its inputs from x, and those before its request's new tokens from its state;
    bias may be None."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_token, is_channel = token < num_tokens, channel < num_channels
    request = tl.load(request_ptr + token, mask=is_token, other=0)
    start = tl.load(query_start_ptr + request, mask=is_token, other=0).to(tl.int64)
    end = tl.load(query_start_ptr + request + 1, mask=is_token, other=0)
    has_past = tl.load(context_len_ptr + request, mask=is_token, other=0) > end - start
    slot = tl.load(slots_ptr + request, mask=is_token, other=0)
    inside = is_token[:, None] & is_channel[None, :]
    total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for tap in tl.static_range(LENGTH):
        source = token - (LENGTH - 1 - tap)
        is_new = source >= start
        of_x = x_ptr + source[:, None] * x_stride + channel[None, :]
        new = tl.load(of_x, mask=inside & is_new[:, None], other=0.0)
        index = source - start + (LENGTH - 1)
        of_state = states_ptr + slot[:, None] * state_stride
        of_state += channel[None, :] * (LENGTH - 1) + index[:, None]
        is_past = has_past & (source < start)
        past = tl.load(of_state, mask=inside & is_past[:, None], other=0.0)
        factor = tl.load(weight_ptr + channel * LENGTH + tap, mask=is_channel, other=0.0)
        total += (new.to(tl.float32) + past.to(tl.float32)) * factor.to(tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0)
        total += bias.to(tl.float32)[None, :]
    if SILU:
        total = total * tl.sigmoid(total)
    to = out_ptr + token[:, None] * num_channels + channel[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _new_states(
    x_ptr,
    states_ptr,
    slots_ptr,
    query_start_ptr,
    context_len_ptr,
    num_channels,
    x_stride,
    state_stride,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The newest inputs of a request. They move to lower indices, in ascending order, and a channel
    is one thread's: so no entry is overwritten before it is read."""
    request = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < num_channels
    # Of each channel, though all are alike: the interpreter takes no single numbers in masks.
    each = tl.zeros((CHANNELS,), dtype=tl.int64)
    start = tl.load(query_start_ptr + request) + each
    end = tl.load(query_start_ptr + request + 1) + each
    has_past = tl.load(context_len_ptr + request) + each > end - start
    slot = tl.load(slots_ptr + request)
    state = states_ptr + slot * state_stride + channel * (LENGTH - 1)
    for index in tl.static_range(LENGTH - 1):
        source = end - (LENGTH - 1) + index
        is_new = source >= start
        new = tl.load(x_ptr + source * x_stride + channel, mask=is_channel & is_new, other=0.0)
        is_past = is_channel & has_past & (source < start)
        past = tl.load(state + index + (end - start), mask=is_past, other=0.0)
        tl.store(state + index, tl.where(is_new, new, past), mask=is_channel)


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
    """As Kernels.causal_conv; slots may lie apart. Reads no tensor on the host."""
    if weight.dim() == 3 or weight.shape[1] > _LONGEST:
        return torch_ops.causal_conv(x, weight, bias, states, slots, batch, silu=silu)
    x = x if x.stride(1) == 1 else x.contiguous()
    (num_tokens, num_channels), length = x.shape, weight.shape[1]
    token = torch.arange(num_tokens, dtype=torch.int32, device=x.device)
    request = torch.searchsorted(batch.query_start[1:], token, right=True, out_int32=True)
    # Tokens that belong to no request (a captured step's padding) count as the last one's.
    request.clamp_(max=len(slots) - 1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(num_channels, _CHANNELS)
    lengths = (batch.query_start, batch.context_len)
    sizes = (num_channels, x.stride(0), states.stride(0))
    _outputs[(triton.cdiv(num_tokens, _TOKENS), blocks)](
        x, weight, bias, states, slots, request, *lengths, out, num_tokens, *sizes,
        LENGTH=length, SILU=silu, TOKENS=_TOKENS, CHANNELS=_CHANNELS,
    )  # fmt: skip
    _new_states[(len(slots), blocks)](
        x, states, slots, *lengths, *sizes, LENGTH=length, CHANNELS=_CHANNELS
    )
    return out
