"""What this machine can do at most, measured: reading memory, and multiplying matrices.

Source of the roofline: Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sapwood.kernels.interface import Kernels

READ_BYTES = 512 << 20
MATRIX_ROWS = 2048
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """bandwidth: bytes per second; rate: floating-point operations per second of matrix products"""

    bandwidth: float
    rate: float

    def seconds(self, num_bytes: int, num_operations: int) -> float:
        """No op that moves and computes so much can be faster."""
        return max(num_bytes / self.bandwidth, num_operations / self.rate)


def measure_limits(
    dtype: torch.dtype, num_threads: int, implementations: Sequence[Kernels]
) -> Limits:
    """Both are the best of a few tries: a limit is not what a busy neighbour leaves. Matrices are
    multiplied by whoever is fastest: torch itself, or one of the implementations."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        memory = torch.ones(READ_BYTES // 4)
        a = torch.randn(MATRIX_ROWS, MATRIX_ROWS, dtype=dtype)
        read_s = best_seconds(memory.sum)
        multiply_s = best_seconds(lambda: a @ a)
        for kernels in implementations:
            kernels.set_num_threads(num_threads)
            product = kernels.pack_linear(a, None)
            multiply_s = min(multiply_s, best_seconds(partial(product, a)))
    finally:
        torch.set_num_threads(before)
    return Limits(bandwidth=READ_BYTES / read_s, rate=2 * MATRIX_ROWS**3 / multiply_s)


def best_seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    call()
    taken: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)
