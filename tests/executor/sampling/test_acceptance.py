"""Guesses that thresholds take: all at 1 leave the model's distribution as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sapwood.executor.sampling.acceptance import AcceptThresholds
from sapwood.executor.sampling.random_numbers import acceptance_numbers, uniforms
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.torch_ops.sampling import NUM_CANDIDATES, kept_probabilities

PROBS = [0.35, 0.25, 0.2, 0.1, 0.06, 0.04, 0.0, 0.0]
LOGITS = torch.tensor(PROBS).log()
CHI_SQUARE_999 = {2: 13.82, 5: 20.52}
"""By degrees of freedom: a true distribution exceeds these once in a thousand times."""


def settings_of(numbers: Sequence[float], *, top_k: int = -1, top_p: float = 1.0, min_p: float = 0):
    count = len(numbers)
    return SamplingSettings(
        temperature=[1.0] * count,
        top_k=[top_k] * count,
        top_p=[top_p] * count,
        min_p=[min_p] * count,
        numbers=list(numbers),
    )


def choose(guesses: Sequence[int], numbers: Sequence[float], **given: float) -> list[int]:
    """The tokens that a place with these guesses gets, one for each number."""
    filters = {name: given.pop(name) for name in ("top_k", "top_p", "min_p") if name in given}
    settings = settings_of(numbers, **filters)  # type: ignore[arg-type]
    logits = LOGITS.repeat(len(numbers), 1)
    thresholds = AcceptThresholds(**given)
    return thresholds.choose(logits, [guesses] * len(numbers), settings).tolist()


def some_numbers(count: int = 4000) -> list[float]:
    counters = np.arange(count, dtype=np.uint64)
    return acceptance_numbers(np.full(count, 11, dtype=np.uint64), counters).tolist()


@pytest.mark.parametrize("guesses", [[0], [3], [4, 1], [2, 7, 0], [6], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.5}], ids=str)
def test_thresholds_of_one_leave_the_distribution(
    guesses: list[int], filters: dict[str, float]
) -> None:
    numbers = some_numbers()
    counts = Counter(choose(guesses, numbers, **filters))
    kept = PROBS if not filters else [*PROBS[:3], *[0.0] * 5]
    wanted = [prob / sum(kept) for prob in kept]
    impossible = [token for token, prob in enumerate(wanted) if prob == 0]
    assert not any(counts[token] for token in impossible)
    chi_square = sum(
        (counts[token] - prob * len(numbers)) ** 2 / (prob * len(numbers))
        for token, prob in enumerate(wanted)
        if prob
    )
    assert chi_square < CHI_SQUARE_999[len(PROBS) - len(impossible) - 1]


def test_the_single_threshold_takes_what_is_likely() -> None:
    numbers = some_numbers(200)
    assert set(choose([1], numbers, single=0.24)) == {1}
    # The first one that is likely enough, not the likeliest.
    assert set(choose([5, 1, 0], [0.99], single=0.19)) == {1}
    assert set(choose([1], numbers, single=0.26)) > {1}


def test_a_guess_without_probability_is_never_taken() -> None:
    numbers = [0.0, *some_numbers(200)]
    for thresholds in ({}, {"single": 1e-9}, {"accumulated": 1e-9}):
        assert not {6, 7} & set(choose([6, 7], numbers, **thresholds))
        assert not {4} & set(choose([4], numbers, top_p=0.7, **thresholds))
    assert set(choose([100], numbers)) <= {0, 1, 2, 3, 4, 5}, "no token of this model"


def test_lower_thresholds_take_more() -> None:
    numbers = some_numbers(4000)

    def share(**thresholds: float) -> float:
        chosen = choose([3, 2], numbers, **thresholds)
        return sum(token in (2, 3) for token in chosen) / len(numbers)

    accumulated = [share(accumulated=threshold) for threshold in (1.0, 0.8, 0.5, 0.31, 0.29)]
    assert accumulated == sorted(accumulated)
    assert accumulated[:3] == pytest.approx([0.3, 0.375, 0.6], abs=0.03)
    assert accumulated[-1] == 1.0
    single = [share(single=threshold) for threshold in (1.0, 0.21, 0.19, 0.1)]
    assert single == sorted(single)
    assert single[1] == single[0] < single[2] == single[3] == 1.0


def test_rounding_leaves_no_place_without_a_token() -> None:
    """All tokens are guessed, and the number is above the sum of their probabilities."""
    last = float(np.nextafter(1.0, 0.0))
    assert choose([6, 2, 1, 0], [last], top_k=3) in ([0], [1], [2])


def test_probabilities_are_those_that_filters_keep() -> None:
    settings = settings_of([0.0], top_k=4, top_p=0.8, min_p=0.5)
    # Four have 0.9; 0.35 and 0.25 and 0.2 reach 0.8 of that; all of them have half of 0.35.
    found = kept_probabilities(LOGITS[None], settings)
    wanted = torch.tensor([[0.35, 0.25, 0.2, 0, 0, 0, 0, 0]], dtype=torch.float64) / 0.8
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [-1, 600])
def test_filters_that_keep_more_than_the_likeliest_candidates(top_k: int) -> None:
    logits = 0.1 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(2))
    found = kept_probabilities(logits, settings_of([0.0], top_k=top_k, top_p=0.8))[0]
    probs, ids = torch.softmax(logits[0].double(), dim=-1).sort(descending=True)
    probs = probs[:top_k] / probs[:top_k].sum() if top_k > 0 else probs
    kept = (probs.cumsum(0) - probs) < 0.8
    assert kept.sum() > NUM_CANDIDATES
    wanted = torch.zeros(1000, dtype=torch.float64)
    wanted[ids[: len(probs)][kept]] = probs[kept] / probs[kept].sum()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_the_numbers_are_not_those_by_which_tokens_are_drawn() -> None:
    seeds, counters = np.full(2000, 5, np.uint64), np.arange(2000, dtype=np.uint64)
    pairs = np.corrcoef(uniforms(seeds, counters), acceptance_numbers(seeds, counters))
    assert abs(pairs[0, 1]) < 0.1
