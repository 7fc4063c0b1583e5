"""Checks of the way from logits to tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sapwood.kernels.conformance.checks import Case, Checks, Pair
from sapwood.kernels.interface import Kernels
from sapwood.kernels.sampling_settings import SamplingSettings

CHECKS = Checks()

SAMPLE_LIMIT = 0.1
"""The limit for how often each token is drawn, relative to the likeliest one's number."""


@CHECKS.add("argmax")
def _argmax(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    logits = case.randn(9, case.vocab_size, dtype=torch.float32)
    logits[3, 5:9] = logits[3].max() + 1  # the first of equal ones
    yield kernels.argmax(logits.clone()), reference.argmax(logits)


@CHECKS.add("mask_logits")
def _mask_logits(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    words = -(-case.vocab_size // 32)
    masks = torch.randint(-(2**31), 2**31, (3, words), generator=case.generator).to(torch.int32)
    logits = case.randn(5, case.vocab_size, dtype=torch.float32)
    mine, its = logits.clone(), logits.clone()
    kernels.mask_logits(mine, masks, [4, 0, 2])
    reference.mask_logits(its, masks, [4, 0, 2])
    yield mine, its


@CHECKS.add("penalise")
def _penalise(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    num_seen = min(200, case.vocab_size)
    ids = torch.randperm(case.vocab_size, generator=case.generator)[:num_seen].to(case.device)
    counts = torch.randint(0, 4, (num_seen,), generator=case.generator).float().to(case.device)
    logits = case.randn(case.vocab_size, dtype=torch.float32)
    mine, its = logits.clone(), logits.clone()
    for ops, row in ((kernels, mine), (reference, its)):
        ops.penalise(row, ids, counts, repetition=1.3, frequency=0.2, presence=0.4)
    yield mine, its


@CHECKS.add("sample", limit=SAMPLE_LIMIT)
def _sample(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """How often each token is drawn with evenly spread random numbers.

    Only frequencies can be compared: each implementation has its own order of tokens.
    """
    count = 256
    logits = (case.randn(1, case.vocab_size, dtype=torch.float32) * 3).repeat(count, 1)
    numbers = [(index + 0.5) / count for index in range(count)]
    for top_k, top_p, min_p in ((1, 1.0, 0.0), (4, 1.0, 0.0), (-1, 0.5, 0.0), (-1, 1.0, 0.3)):
        settings = SamplingSettings(
            temperature=[0.9] * count,
            top_k=[top_k] * count,
            top_p=[top_p] * count,
            min_p=[min_p] * count,
            numbers=numbers,
        )
        got, wanted = (ops.sample(logits.clone(), settings) for ops in (kernels, reference))
        drawn, expected = (
            torch.bincount(tokens.cpu(), minlength=case.vocab_size) for tokens in (got, wanted)
        )
        yield drawn, expected


@CHECKS.add("soft_cap")
def _soft_cap(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    mine = case.randn(3, case.vocab_size, dtype=torch.float32) * 40
    its = mine.clone()
    kernels.soft_cap(mine, 30.0)
    reference.soft_cap(its, 30.0)
    yield mine, its
