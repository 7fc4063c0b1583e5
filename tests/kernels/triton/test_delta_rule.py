"""The Triton kernels of the gated delta rule and of gated norms against ReferenceKernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.triton.ops import TritonKernels
from tests.kernels.test_convolution import batch_of
from tests.kernels.test_delta_rule import Text, make_form, make_text, run
from tests.kernels.triton.test_convolution import TOLERANCE, moved
from tests.tiers import long_only

WHOLE = 70
"""Tokens of a text: several chunks, of which the last is cut off."""


@pytest.mark.parametrize("lowest", [None, -5.0])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_states(
    device: torch.device, dtype: torch.dtype, lowest: float | None, *, per_channel: bool
) -> None:
    torch.manual_seed(0)
    form = make_form((1, 2), (12, 20), per_channel=per_channel, write_scale=2.0, lowest=lowest)
    text = make_text(form, 12, dtype)
    batch, slots = batch_of((1, 2, 9), (7, 2, 31)), torch.tensor([4, 0, 2])
    # The states of other layers lie between; a request without a past finds another one's.
    pool = torch.randn(5, 2, 2, 12, 20)
    expected = pool.clone()
    want = ReferenceKernels().gated_delta_rule(
        text.qkv, text.decay, text.write, form, expected[:, 1], slots, batch
    )
    on_device = pool.to(device)
    moved_form = replace(form, rate=form.rate.to(device), shift=form.shift.to(device))
    inputs = [x.to(device) for x in (text.qkv, text.decay, text.write)]
    got = TritonKernels().gated_delta_rule(
        *inputs, moved_form, on_device[:, 1], slots.to(device), moved(batch, device)
    )
    assert got.dtype == dtype
    tolerance = max(TOLERANCE[dtype], 2e-5)
    torch.testing.assert_close(got.cpu(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(on_device.cpu(), expected, atol=tolerance, rtol=tolerance)


def test_tokens_of_no_request_change_no_state(device: torch.device) -> None:
    """A captured step of pieces is padded with such tokens after the last request's."""
    torch.manual_seed(0)
    form = make_form((1, 1), (8, 8))
    form = replace(form, rate=form.rate.to(device), shift=form.shift.to(device))
    text = make_text(form, 7)
    inputs = [x.to(device) for x in (text.qkv, text.decay, text.write)]
    results = []
    for length in (5, 7):
        states = torch.zeros(2, 1, 8, 8, device=device)
        slots, batch = torch.tensor([1, 0], device=device), moved(batch_of([1, 4], [1, 4]), device)
        rows = [x[:length] for x in inputs]
        out = TritonKernels().gated_delta_rule(*rows, form, states, slots, batch)
        results.append((out[:5], states))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


class OnDevice(TritonKernels):
    """Takes tensors of the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def gated_delta_rule(  # type: ignore[override]
        self,
        qkv: Tensor,
        decay: Tensor,
        write: Tensor,
        form: DeltaForm,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
    ) -> Tensor:
        device = self.device
        there = replace(form, rate=form.rate.to(device), shift=form.shift.to(device))
        own = states.to(device)
        inputs = [x.to(device) for x in (qkv, decay, write)]
        out = super().gated_delta_rule(*inputs, there, own, slots.to(device), moved(batch, device))
        states.copy_(own)
        return out.cpu()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("size", [2, 65, WHOLE, *long_only(1, 63, 64)])
def test_chunks_equal_steps(device: torch.device, size: int, *, per_channel: bool) -> None:
    torch.manual_seed(1)
    length = WHOLE if size > 2 else 11
    form = make_form((1, 1), (8, 16), per_channel=per_channel)
    text = make_text(form, length)
    (want,), expected = run(ReferenceKernels(), form, [text], [{0: length}])
    steps = [{0: min(size, length - first)} for first in range(0, length, size)]
    (got,), states = run(OnDevice(device), form, [text], steps)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(states, expected, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("per_channel", [False, True])
def test_extreme_decays_are_finite(device: torch.device, *, per_channel: bool) -> None:
    torch.manual_seed(4)
    form = replace(make_form((1, 1), per_channel=per_channel), rate=torch.full((1,), 16.0))
    text = make_text(form, 40)
    text = replace(text, decay=torch.where(text.decay > 0, 90.0, -90.0))
    (want,), _ = run(ReferenceKernels(), form, [text], [{0: 40}])
    (got,), _ = run(OnDevice(device), form, [text], [{0: 30}, {0: 10}])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_a_key_that_is_repeated_loses_no_precision(device: torch.device) -> None:
    """Each token takes back what the one before it wrote: an inverted system would not be exact."""
    torch.manual_seed(5)
    form = make_form((1, 1), (16, 16), write_scale=2.0)
    text = make_text(form, 48)
    qkv = text.qkv.clone()
    qkv[:, :32] = qkv[:1, :32]
    text = Text(qkv, torch.full_like(text.decay, -90.0), torch.full_like(text.write, 90.0))
    (want,), _ = run(ReferenceKernels(), form, [text], [{0: 48}])
    (got,), _ = run(OnDevice(device), form, [text], [{0: 48}])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("logistic", [True, False])
def test_gated_norms(device: torch.device, *, norm_first: bool, logistic: bool) -> None:
    torch.manual_seed(0)
    form = GatedNormForm(group=20, eps=1e-5, norm_first=norm_first, logistic=logistic)
    x, both, weight = torch.randn(3, 60), torch.randn(3, 120), torch.randn(60)
    want = ReferenceKernels().gated_rms_norm(x, both[:, 60:], weight, form)
    got = TritonKernels().gated_rms_norm(
        x.to(device), both.to(device)[:, 60:], weight.to(device), form
    )
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-5)
