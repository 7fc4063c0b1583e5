"""The short convolution: what torch's own gives for a whole text, however it is cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from tests.tiers import examples

CHANNELS, NUM_SLOTS = 6, 9


def batch_of(query_lens: Sequence[int], context_lens: Sequence[int]) -> AttentionBatch:
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
    return AttentionBatch(
        page_table=torch.zeros(len(query_lens), 1, dtype=torch.int32),
        query_start=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32),
        context_len=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_decodes=num_decodes,
    )


def whole(x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = False) -> Tensor:
    """x [T, C] of one text, by torch's convolution."""
    length = weight.shape[1]
    padded = F.pad(x.float().T[None], (length - 1, 0))
    wide = None if bias is None else bias.float()
    out = F.conv1d(padded, weight.float()[:, None], wide, groups=x.shape[1])[0].T
    return F.silu(out) if silu else out


def run_steps(
    kernels: Kernels,
    texts: Sequence[Tensor],
    steps: Sequence[dict[int, int]],
    weight: Tensor,
    bias: Tensor | None,
    *,
    silu: bool = False,
) -> list[Tensor]:
    """Each step gives some texts a number of their next tokens; a state is NaN before its text."""
    dtype = texts[0].dtype
    states = torch.full((NUM_SLOTS, CHANNELS, weight.shape[1] - 1), torch.nan, dtype=dtype)
    slots = torch.randperm(NUM_SLOTS)[: len(texts)]
    done = [0] * len(texts)
    found: list[list[Tensor]] = [[] for _ in texts]
    for step in steps:
        order = sorted(step, key=lambda text: step[text] > 1)  # decodes first
        lens = [step[text] for text in order]
        x = torch.cat([texts[text][done[text] : done[text] + step[text]] for text in order])
        for text in order:
            done[text] += step[text]
        batch = batch_of(lens, [done[text] for text in order])
        # Inputs are columns of something wider, as of a projection to more than they.
        x = torch.cat((x, x), dim=1)[:, :CHANNELS]
        out = kernels.causal_conv(x, weight, bias, states, slots[order], batch, silu=silu)
        assert out.dtype == dtype
        for text, part in zip(order, out.split(lens), strict=True):
            found[text].append(part)
    unused = [slot for slot in range(NUM_SLOTS) if slot not in slots.tolist()]
    assert states[unused].isnan().all()
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize(("has_bias", "silu"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(
    "steps",
    [
        [{0: 8, 1: 5}],
        [{0: 1, 1: 1}, {1: 1, 0: 1}, {0: 6, 1: 3}],
        [{0: 7}, {0: 1, 1: 2}, {1: 3}],
        [{1: 1}, {0: 2}, {0: 2, 1: 1}, {0: 4, 1: 1}, {1: 2}],
    ],
)
def test_chunks_and_decodes(
    any_kernels: Kernels,
    dtype: torch.dtype,
    length: int,
    has_bias: bool,
    silu: bool,
    steps: list[dict[int, int]],
) -> None:
    torch.manual_seed(3)
    texts = [torch.randn(count, CHANNELS).to(dtype) for count in (8, 5)]
    weight = torch.randn(CHANNELS, length).to(dtype)
    bias = torch.randn(CHANNELS).to(dtype) if has_bias else None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for kernels in (any_kernels, ReferenceKernels()):
        results = run_steps(kernels, texts, steps, weight, bias, silu=silu)
        for text, found in zip(texts, results, strict=True):
            want = whole(text, weight, bias, silu=silu)
            torch.testing.assert_close(found.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 3, 4, 7])
def test_each_token_may_have_its_own_weights(
    any_kernels: Kernels, dtype: torch.dtype, length: int
) -> None:
    """A request with a past, and two without; beside one weight for all, which changes the rest."""
    torch.manual_seed(9)
    lens, contexts = [3, 1, 9], [5, 1, 9]
    x = torch.randn(sum(lens), CHANNELS).to(dtype)
    weights = torch.randn(sum(lens), CHANNELS, length).to(dtype)
    slots, batch = torch.tensor([2, 0, 3]), batch_of(lens, contexts)
    pool = torch.randn(NUM_SLOTS, CHANNELS, length - 1).to(dtype)
    expected, states = pool.clone(), pool.clone()
    got = any_kernels.causal_conv(x, weights, None, states, slots, batch, silu=True)
    for token in range(sum(lens)):
        states_of_all = pool.clone()
        alike = ReferenceKernels().causal_conv(
            x, weights[token], None, states_of_all, slots, batch, silu=True
        )
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[token], alike[token], rtol=tolerance, atol=tolerance)
        expected = states_of_all
    assert torch.equal(states, expected)


@given(data=st.data(), length=st.integers(2, 5))
@settings(max_examples=examples(300))
def test_any_cut_equals_the_whole(data: st.DataObject, length: int) -> None:
    torch.manual_seed(7)
    counts = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    texts = [torch.randn(count, CHANNELS) for count in counts]
    weight, bias = torch.randn(CHANNELS, length), torch.randn(CHANNELS)
    left, steps = list(counts), []
    while any(left):
        open_texts = [text for text, count in enumerate(left) if count]
        chosen = data.draw(st.sets(st.sampled_from(open_texts), min_size=1))
        step = {text: data.draw(st.integers(1, left[text])) for text in sorted(chosen)}
        for text, count in step.items():
            left[text] -= count
        steps.append(step)
    for text, found in zip(
        texts, run_steps(TorchKernels(), texts, steps, weight, bias), strict=True
    ):
        torch.testing.assert_close(found, whole(text, weight, bias), rtol=1e-5, atol=1e-5)


def test_tokens_of_no_request_change_no_state() -> None:
    """A captured step of pieces is padded with such tokens after the last request's."""
    x, weight = torch.randn(7, CHANNELS), torch.randn(CHANNELS, 4)
    results = []
    for rows in (x[:5], x):
        states = torch.zeros(2, CHANNELS, 3)
        batch, slots = batch_of([1, 4], [1, 4]), torch.tensor([1, 0])
        out = TorchKernels().causal_conv(rows, weight, None, states, slots, batch)
        results.append((out[:5], states))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_more_factors_than_the_compiled_op_takes(any_kernels: Kernels) -> None:
    texts, weight = [torch.randn(40, CHANNELS)], torch.randn(CHANNELS, 18)
    (found,) = run_steps(any_kernels, texts, [{0: 5}, {0: 1}, {0: 34}], weight, None)
    torch.testing.assert_close(found, whole(texts[0], weight, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 16, 37, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_channels_and_slots_that_lie_apart(channels: int, threads: int) -> None:
    kernels = native_or_skip(threads)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(300, channels).to(dtype), torch.randn(channels, 3).to(dtype)
        results = []
        for one in (kernels, ReferenceKernels()):
            states = torch.ones(4, 5, channels, 2, dtype=dtype)
            slots, batch = torch.tensor([3, 0, 2]), batch_of([1, 2, 297], [7, 2, 300])
            out = one.causal_conv(x, weight, None, states[:, 1], slots, batch)
            assert (states[:, [0, 2, 3, 4]] == 1).all()
            results.append((out, states))
        tolerance = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
        assert torch.equal(results[0][1], results[1][1])


def native_or_skip(num_threads: int = 1) -> CpuKernels:
    if not CpuKernels.usable_isas():
        pytest.skip("this build has no C++ kernels")
    return CpuKernels(num_threads=num_threads)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"slots": torch.tensor([0, 9])}, IndexError, r"slots\[1\] is 9"),
        ({"slots": torch.tensor([0, -1])}, IndexError, r"slots\[1\] is -1"),
        ({"slots": torch.tensor([0])}, ValueError, r"slots \[1\] int64 must be \[2\]"),
        ({"states": torch.zeros(9, CHANNELS, 3)}, ValueError, "states"),
        ({"states": torch.zeros(9, 2, CHANNELS).transpose(1, 2)}, ValueError, "contiguous"),
        ({"weight": torch.zeros(CHANNELS, 3).bfloat16()}, ValueError, "weight"),
        ({"bias": torch.zeros(CHANNELS + 1)}, ValueError, "bias"),
        ({"x": torch.zeros(4, CHANNELS)}, ValueError, "query_start does not go from 0 up to the 4"),
        ({"x": torch.zeros(3, CHANNELS + 1)}, ValueError, "channels"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    changed: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    arguments = {
        "x": torch.ones(3, CHANNELS), "weight": torch.zeros(CHANNELS, 3), "bias": None,
        "states": torch.zeros(9, CHANNELS, 2), "slots": torch.tensor([0, 1]), **changed,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        native_or_skip().causal_conv(**arguments, batch=batch_of([1, 2], [1, 2]))
    assert not arguments["states"].any()
