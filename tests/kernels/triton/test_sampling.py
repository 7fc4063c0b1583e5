"""Draws without a sort against the reference's, which sorts in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.triton.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy


def make_settings(count: int, numbers: Tensor, **filters: float) -> SamplingSettings:
    how = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, **filters}
    return SamplingSettings(
        temperature=[how["temperature"]] * count,
        top_k=[int(how["top_k"])] * count,
        top_p=[how["top_p"]] * count,
        min_p=[how["min_p"]] * count,
        numbers=numbers.tolist(),
    )


def check(logits: Tensor, settings: SamplingSettings) -> None:
    """The same tokens. Where a boundary is within 1e-5 of a row's number they might differ; none of
    the numbers that these seeds give is."""
    got = sample(logits, settings)
    assert got.dtype == torch.int64
    assert got.tolist() == ReferenceKernels().sample(logits, settings).tolist()


def random_logits(rows: int, vocab: int, spread: float, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(vocab + int(spread * 10))
    return (torch.randn(rows, vocab, generator=generator) * spread).to(device)


@pytest.mark.parametrize(
    ("filters", "spread", "dtype"),
    [
        ({}, 0.3, torch.float32),
        ({}, 4.0, torch.bfloat16),
        ({"temperature": 0.6}, 4.0, torch.float32),
        ({"top_k": 1}, 0.3, torch.bfloat16),
        ({"top_k": 40}, 4.0, torch.bfloat16),
        ({"top_k": 600, "top_p": 0.9}, 0.3, torch.float32),
        ({"top_p": 0.05}, 4.0, torch.float16),
        ({"top_p": 0.95}, 4.0, torch.bfloat16),
        ({"min_p": 0.1}, 4.0, torch.float32),
        ({"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3}, 2.0, torch.float32),
        ({"top_k": 5000}, 4.0, torch.float32),
    ],
    ids=str,
)
def test_filters(
    device: torch.device, filters: dict[str, float], spread: float, dtype: torch.dtype
) -> None:
    logits = random_logits(2, 700, spread, device).to(dtype)
    generator = torch.Generator().manual_seed(len(str(filters)))
    numbers = torch.rand(2, generator=generator, dtype=torch.float64)
    check(logits, make_settings(2, numbers, **filters))


def test_rows_of_all_kinds_over_several_splits(device: torch.device) -> None:
    logits = random_logits(4, 9000, 3.0, device)
    settings = SamplingSettings(
        temperature=[1.0, 0.5, 1.5, 0.9],
        top_k=[-1, 50, -1, 3],
        top_p=[1.0, 0.9, 0.99, 1.0],
        min_p=[0.0, 0.0, 0.01, 0.0],
        numbers=[0.1, 0.9, 0.5, 0.99999],
    )
    check(logits, settings)


def test_equal_logits_count_in_the_order_of_their_ids(device: torch.device) -> None:
    logits = torch.zeros(4, 300, device=device)
    logits[:, 200:] = 1.0
    settings = SamplingSettings(
        temperature=[1.0] * 4,
        top_k=[10, -1, -1, 101],
        top_p=[1.0, 0.5, 1.0, 1.0],
        min_p=[0.0] * 4,
        numbers=[0.95, 0.999, 0.7, 0.9999],
    )
    check(logits, settings)


def test_half_of_two_equal_tokens_is_the_first(device: torch.device) -> None:
    logits = torch.full((1, 40), -torch.inf, device=device)
    logits[0, [7, 30]] = 3.0
    numbers = torch.tensor([0.99], dtype=torch.float64)
    assert sample(logits, make_settings(1, numbers, top_p=0.5)).tolist() == [7]
    assert sample(logits, make_settings(1, numbers, top_p=0.51)).tolist() == [30]


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
def test_forbidden_tokens_are_never_drawn(device: torch.device, filters: dict[str, float]) -> None:
    logits = torch.full((3, 100), -torch.inf, device=device)
    logits[:, [3, 77, 99]] = torch.tensor([1.0, 2.0, 1.5], device=device)
    numbers = torch.tensor([0.0, 0.6, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, make_settings(3, numbers, **filters)).tolist() == [77, 99, 3]


def test_rows_of_nan_and_of_nothing_give_some_token(device: torch.device) -> None:
    logits = torch.full((2, 100), torch.nan, device=device)
    logits[1] = -torch.inf
    numbers = torch.tensor([0.3, 0.7], dtype=torch.float64)
    for filters in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        chosen = sample(logits, make_settings(2, numbers, **filters))
        assert all(0 <= token < 100 for token in chosen.tolist())


def test_no_rows(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.float64)
    assert sample(torch.zeros(0, 9, device=device), make_settings(0, none)).shape == (0,)
