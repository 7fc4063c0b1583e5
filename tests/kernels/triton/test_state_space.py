"""The Triton kernel of state space layers against ReferenceKernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.triton.ops import TritonKernels
from tests.kernels.test_convolution import batch_of
from tests.kernels.test_state_space import KINDS, defined, layer_of, text_of
from tests.kernels.triton.test_convolution import moved
from tests.tiers import long_only

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("query_lens", "context_lens"), [((1, 2, 5), (7, 2, 11))])
def test_outputs_and_states(
    device: torch.device,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    kind: str,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    layer = layer_of(kind, heads=2, head_dim=37, state_size=5)
    batch, text = batch_of(query_lens, context_lens), text_of(layer, sum(query_lens), dtype)
    pool = torch.randn(4, 2, *layer.shape).to(state_dtype)
    slots = torch.tensor([3, 0, 2])
    for request, (new, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        if new == length:
            pool[slots[request]] = torch.nan  # another request's
    expected = pool.clone()
    want = ReferenceKernels().selective_scan(
        text.x, text.b, text.c, text.dt, layer, expected[:, 1], slots, batch, gate=text.gate
    )
    there = replace(
        layer,
        **{
            name: None if tensor is None else tensor.to(device)
            for name, tensor in (
                ("rates", layer.rates), ("dt_bias", layer.dt_bias), ("skip", layer.skip)
            )
        },
    )  # fmt: skip
    on_device = pool.to(device)
    *inputs, gate = (
        None if one is None else one.to(device)
        for one in (text.x, text.b, text.c, text.dt, text.gate)
    )
    got = TritonKernels().selective_scan(
        *inputs, there, on_device[:, 1], slots.to(device), moved(batch, device), gate=gate
    )
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(got.cpu(), want, **close)
    rounding = 1e-4 if state_dtype == torch.float32 else 2**-6
    torch.testing.assert_close(on_device.cpu()[:, 1][slots], expected[:, 1][slots],
                               atol=rounding, rtol=rounding)  # fmt: skip


@pytest.mark.parametrize("kind", ["mamba 2", "lightning"])
@pytest.mark.parametrize("size", [2, 65, 70, *long_only(1, 63, 64)])
def test_chunks_equal_the_whole(device: torch.device, kind: str, size: int) -> None:
    torch.manual_seed(1)
    length = 70 if size > 2 else 11
    layer = layer_of(kind, heads=2, head_dim=20, groups=1, state_size=9)
    text = text_of(layer, length)
    want, last = defined(layer, text)
    there = replace(
        layer,
        **{
            name: None if tensor is None else tensor.to(device)
            for name in ("rates", "dt_bias", "skip")
            for tensor in [getattr(layer, name)]
        },
    )
    states, slots = torch.full((2, *layer.shape), torch.nan, device=device), torch.tensor([1])
    found = []
    for start in range(0, length, size):
        part = text.part(start, min(start + size, length))
        inputs = [None if one is None else one.to(device) for one in (part.x, part.b, part.c)]
        dt = None if part.dt is None else part.dt.to(device)
        batch = moved(batch_of([len(part.x)], [start + len(part.x)]), device)
        found.append(
            TritonKernels().selective_scan(*inputs, dt, there, states, slots.to(device), batch)
        )
    torch.testing.assert_close(torch.cat(found).cpu(), want.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[1].cpu(), last.float(), atol=1e-4, rtol=1e-4)
