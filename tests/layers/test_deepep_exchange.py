"""Rows that DeepEP sends are those of our own exchange, and so is what comes back.

A stand-in follows the library's contract on CPUs, over gloo: no GPU has run this."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.distributed import deepep
from sapwood.distributed.groups import Group
from sapwood.distributed.meeting import Meeting
from sapwood.layers.deepep_exchange import DeepEPExchange
from sapwood.layers.expert_exchange import ExpertExchange, GroupExchange
from tests.distributed import standin_deepep

SIZE, NUM_OWN, NUM_CHOSEN = 16, 3, 4


class Mixed:
    """What one rank's experts give, and what they were given."""

    def __init__(self, rank: int) -> None:
        self.asked: list[Tensor] = []
        generator = torch.Generator().manual_seed(rank)
        self._scales = torch.randn(NUM_OWN, SIZE, generator=generator)

    def __call__(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        self.asked += [x, slots.masked_fill(weights == 0, -1), weights]  # any slot of weight 0
        every = x.float()[:, None] * self._scales[slots] * weights[..., None]
        return every.sum(dim=1).to(x.dtype)


def sent(rank: int, exchange: ExpertExchange, numbers: list[int], seed: int) -> list[Tensor]:
    """What a rank gets for its rows, and what its experts were asked."""
    generator = torch.Generator().manual_seed(seed + rank)
    num_rows, num_slots = numbers[rank], NUM_OWN * len(numbers)
    x = torch.randn(num_rows, SIZE, generator=generator).to(torch.bfloat16)
    order = torch.rand(num_rows, num_slots, generator=generator).argsort(dim=1)
    slots = order[:, :NUM_CHOSEN]
    weights = torch.rand(num_rows, NUM_CHOSEN, generator=generator)
    weights[torch.rand(num_rows, NUM_CHOSEN, generator=generator) < 0.3] = 0.0
    mixed = Mixed(rank)
    return [exchange(x, slots, weights, mixed, num_own=NUM_OWN), *mixed.asked]


@pytest.mark.parametrize("size", [2, 4])
def test_it_sends_the_same_rows_and_adds_up_the_same_bits(tmp_path: Path, size: int) -> None:
    meetings = [Meeting.in_folder(tmp_path, timeout_s=60.0) for _ in range(size)]
    pool = ThreadPoolExecutor(size)

    def meet(rank: int) -> list[Group]:
        cpu = torch.device("cpu")
        return [meetings[rank].group(name, range(size), rank, cpu) for name in ("rows", "numbers")]

    groups = list(pool.map(meet, range(size)))

    def open_buffer(rank: int) -> deepep.Buffer:
        return deepep.open_buffer(groups[rank][1], row_bytes=2 * SIZE, library=standin_deepep)

    buffers = list(pool.map(open_buffer, range(size)))

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        numbers=st.lists(st.integers(0, 7), min_size=size, max_size=size),
        seed=st.integers(0, 1000),
    )
    def check(numbers: list[int], seed: int) -> None:
        def run(rank: int) -> None:
            own = GroupExchange(*groups[rank])
            theirs = DeepEPExchange(buffers[rank], size)
            expected = sent(rank, own, numbers, seed)
            found = sent(rank, theirs, numbers, seed)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)

        list(pool.map(run, range(size)))

    check()
