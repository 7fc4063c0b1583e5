"""The Triton kernels of short convolutions against ReferenceKernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.triton.ops import TritonKernels
from tests.kernels.test_convolution import batch_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
NUM_SLOTS = 5


def moved(batch: AttentionBatch, device: torch.device) -> AttentionBatch:
    return replace(
        batch,
        query_start=batch.query_start.to(device),
        context_len=batch.context_len.to(device),
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("channels", "length"), [(1, 2), (48, 3), (300, 4), (7, 6), (9, 20)])
@pytest.mark.parametrize(("has_bias", "silu"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ((1, 1, 1), (1, 2, 50)),  # decodes, one of which is a prompt of one token
        ((1, 2, 29), (7, 2, 31)),  # a decode, a prompt, and a chunk with a past
        ((11,), (11,)),
    ],
)
def test_outputs_and_states(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    length: int,
    has_bias: bool,
    silu: bool,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    batch, num_tokens = batch_of(query_lens, context_lens), sum(query_lens)
    x = torch.randn(num_tokens, 2 * channels).to(dtype)[:, :channels]
    weight = torch.randn(channels, length).to(dtype)
    bias = torch.randn(channels).to(dtype) if has_bias else None
    # The states of other layers lie between; a request without a past finds another one's.
    pool = torch.randn(NUM_SLOTS, 2, channels, length - 1).to(dtype)
    slots = torch.tensor([4, 0, 2])[: len(query_lens)]
    expected = pool.clone()
    want = ReferenceKernels().causal_conv(x, weight, bias, expected[:, 1], slots, batch, silu=silu)
    on_device = pool.to(device)
    got = TritonKernels().causal_conv(
        x.to(device),
        weight.to(device),
        None if bias is None else bias.to(device),
        on_device[:, 1],
        slots.to(device),
        moved(batch, device),
        silu=silu,
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(on_device.cpu(), expected)


def test_tokens_of_no_request_change_no_state(device: torch.device) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 6, device=device), torch.randn(6, 4, device=device)
    batch = moved(batch_of([1, 4], [1, 4]), device)
    results = []
    for rows in (x[:5], x):
        states = torch.zeros(2, 6, 3, device=device)
        slots = torch.tensor([1, 0], device=device)
        out = TritonKernels().causal_conv(rows, weight, None, states, slots, batch)
        results.append((out[:5], states))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
