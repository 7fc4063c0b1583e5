"""Measures the limits of a device; the figures of steps are shares of these limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sapwood.kernels.transfer import synchronize


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a device.

    copy_bytes_s  bytes per second that a large copy reads and writes
    flop_s        operations per second of a large bf16 product
    """

    copy_bytes_s: float
    flop_s: float


def measure_limits(device: torch.device, *, quick: bool) -> Limits:
    """A copy far larger than any cache; a square product that fills the device."""
    num_bytes, side = (2**24, 256) if quick else (2**31, 8192)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_per_run(lambda: target.copy_(source), device, repeats=3 if quick else 20)
    # Random numbers: products of zeros need less power, and are faster than usual products.
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in "ab")
    product_s = seconds_per_run(lambda: a @ b, device, repeats=3 if quick else 20)
    return Limits(copy_bytes_s=2 * num_bytes / copy_s, flop_s=2 * side**3 / product_s)


def seconds_per_run(run: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """The mean of `repeats` runs queued one after the other, after two that do not count."""
    run()
    run()
    synchronize(device)
    start_s = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start_s) / repeats
