"""Measures the limits of this machine: reading memory, and multiplying matrices.

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
    """The limits of a machine.

    bandwidth  bytes per second that can be read
    rate       floating-point operations per second of matrix products
    """

    bandwidth: float
    rate: float

    def seconds(self, num_bytes: int, num_operations: int) -> float:
        """The least time that an op with these bytes and operations can take."""
        return max(num_bytes / self.bandwidth, num_operations / self.rate)


def measure_limits(
    dtype: torch.dtype, num_threads: int, implementations: Sequence[Kernels]
) -> Limits:
    """The limits: each is the best of a few tries, because other processes may be busy meanwhile.

    Matrices are multiplied by the fastest way there is: torch, or one of the implementations.
    """
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
