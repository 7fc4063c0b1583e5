"""Drawing tokens: every implementation against the filtered probabilities themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.torch_ops import TorchKernels
from tests.tiers import sweep

COUNT = 3000
IMPLEMENTATIONS = ["reference", "torch", *CpuKernels.usable_isas()]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "reference":
        return ReferenceKernels()
    if request.param == "torch":
        return TorchKernels()
    return CpuKernels(num_threads=2, isa=request.param)


def make_settings(count: int, **filters: float) -> SamplingSettings:
    """`count` settings of one kind, evenly over the distribution."""
    how = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, **filters}
    return SamplingSettings(
        temperature=[how["temperature"]] * count,
        top_k=[int(how["top_k"])] * count,
        top_p=[how["top_p"]] * count,
        min_p=[how["min_p"]] * count,
        numbers=[(i + 0.5) / count for i in range(count)],
    )


def filtered(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """The probability of each token of one row of logits."""
    probs = torch.softmax(logits.double() / settings.temperature[0], dim=-1)
    ranked, order = probs.sort(descending=True, stable=True)
    if settings.top_k[0] != -1:
        ranked[settings.top_k[0] :] = 0.0
    if settings.top_p[0] < 1:
        ranked[(ranked.cumsum(-1) - ranked) >= settings.top_p[0] * ranked.sum()] = 0.0
    ranked[ranked < settings.min_p[0] * ranked[0]] = 0.0
    return torch.zeros_like(probs).scatter(0, order, ranked / ranked.sum())


@sweep(
    kernels=IMPLEMENTATIONS,
    dtype=[torch.float32, torch.bfloat16],
    spread=[0.3, 4.0],
    filters=[
        {},
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 400},
        {"top_k": 2000},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
        {"top_p": 0.95, "min_p": 0.3},
    ],
    indirect=("kernels",),
)
def test_each_token_is_drawn_as_often_as_it_is_likely(
    kernels: Kernels, dtype: torch.dtype, spread: float, filters: dict[str, float]
) -> None:
    """spread: 0.3 is flat, 4.0 peaked."""
    vocab = 1003
    logits = (torch.randn(vocab, generator=torch.Generator().manual_seed(4)) * spread).to(dtype)
    count = 300 if isinstance(kernels, ReferenceKernels) else COUNT
    settings = make_settings(count, **filters)
    chosen = kernels.sample(logits.expand(count, vocab).contiguous(), settings)
    expected = filtered(logits, settings)
    got = torch.bincount(chosen, minlength=vocab)
    # Evenly spread numbers meet each token's share of [0, 1) at most once too often or too rarely.
    # Tokens at a filter's edge may be equally likely, or differ by less than fp32 can tell.
    assert (got - expected * count).abs().max() <= 2
    assert got[expected == 0].sum() <= 2


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
def test_masked_tokens_are_never_drawn(kernels: Kernels, filters: dict[str, float]) -> None:
    logits = torch.full((64, 500), -torch.inf)
    logits[:, [3, 77, 499]] = torch.tensor([1.0, 2.0, 1.5])
    chosen = kernels.sample(logits, make_settings(64, **filters))
    assert set(chosen.tolist()) == {3, 77, 499}


def test_a_row_does_not_depend_on_the_others(kernels: Kernels) -> None:
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(1)) * 2
    settings = SamplingSettings(
        temperature=[1.0, 0.5, 2.0, 1.0, 1.0, 0.9],
        top_k=[-1, 50, -1, 5, -1, 4000],
        top_p=[1.0, 0.9, 0.5, 1.0, 0.99, 0.7],
        min_p=[0.0, 0.0, 0.01, 0.0, 0.2, 0.0],
        numbers=[0.1, 0.9, 0.5, 0.3, 0.7, 0.99],
    )
    together = kernels.sample(logits, settings).tolist()
    for i in range(6):
        one = SamplingSettings(
            temperature=settings.temperature[i : i + 1],
            top_k=settings.top_k[i : i + 1],
            top_p=settings.top_p[i : i + 1],
            min_p=settings.min_p[i : i + 1],
            numbers=settings.numbers[i : i + 1],
        )
        assert kernels.sample(logits[i : i + 1], one).tolist() == together[i : i + 1]


def test_nan_gives_some_token() -> None:
    if not CpuKernels.usable_isas():
        reason = CpuKernels.why_not(
            Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=1)
        )
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    logits = torch.full((2, 100), torch.nan)
    for isa in CpuKernels.usable_isas():
        for settings in (make_settings(2), make_settings(2, top_p=0.5), make_settings(2, top_k=3)):
            chosen = CpuKernels(isa=isa).sample(logits, settings)
            assert all(0 <= token < 100 for token in chosen.tolist())
