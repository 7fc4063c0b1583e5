"""Ranks that exchange numbers in shared memory. Threads play the ranks: the memory is the same."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sapwood.distributed import shared_memory
from sapwood.distributed.shared_memory import CAPACITY, SharedMemory, num_bytes

pytestmark = pytest.mark.skipif(not shared_memory.is_compiled(), reason="needs the compiled module")


def ranks_of(size: int) -> list[SharedMemory]:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), num_bytes(size))
        return [SharedMemory(file.fileno(), rank, size) for rank in range(size)]


def on_all(ranks: list[SharedMemory], act: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=act, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_those_of_all_ranks_and_alike_on_each(size: int, dtype: torch.dtype) -> None:
    ranks = ranks_of(size)
    shapes = [(1, 1), (3, 70), (1, 2500), (2, CAPACITY // 4 + 9)]  # the last one in pieces
    for shape in shapes:
        parts = [torch.randn(shape, dtype=dtype) for _ in range(size)]
        total = torch.stack([part.float() for part in parts]).sum(0)
        on_all(ranks, lambda rank, parts=parts: ranks[rank].add_up(parts[rank]))
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(parts[0].float(), total, atol=tolerance, rtol=tolerance)
        assert all(torch.equal(parts[0], part) for part in parts)


def test_gathered_rows_lie_side_by_side() -> None:
    ranks, found = ranks_of(2), [torch.empty(0)] * 2
    parts = [torch.randn(5, 200_000) for _ in range(2)]

    def gather(rank: int) -> None:
        found[rank] = ranks[rank].gather(parts[rank])

    on_all(ranks, gather)
    assert torch.equal(found[0], torch.cat(parts, dim=1))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_gets_the_rows_for_it_by_rank(size: int) -> None:
    ranks = ranks_of(size)
    generator = torch.Generator().manual_seed(size)
    for width, most in ((7, 6), (3001, 40), (5, 1)):  # the second one in pieces
        counts = torch.randint(most, (size, size), generator=generator)
        rows = [torch.randint(256, (int(of.sum()), width)).to(torch.uint8) for of in counts]
        found = [rows[0].new_empty(int(counts[:, rank].sum()), width) for rank in range(size)]

        def exchange(rank: int, *of: Any) -> None:
            rows, found, counts = of
            ranks[rank].exchange(rows[rank], found[rank], counts)

        on_all(ranks, lambda rank, of=(rows, found, counts): exchange(rank, *of))
        for rank in range(size):
            split = [x.split(of.tolist()) for x, of in zip(rows, counts, strict=True)]
            assert torch.equal(found[rank], torch.cat([one[rank] for one in split]))


def test_who_waits_for_a_rank_that_is_gone_is_told() -> None:
    first, _ = ranks_of(2)
    threading.Timer(0.05, first.stop).start()
    with pytest.raises(RuntimeError, match="another rank has ended"):
        first.add_up(torch.zeros(4))
