"""The ops in C++ (csrc/), with the instruction set chosen when the process starts."""

from sapwood.kernels.cpu.native import (
    CpuKernels,
    exact_products_are_free,
    fast_bfloat16,
    slower_because,
    with_isa,
)

__all__ = [
    "CpuKernels",
    "exact_products_are_free",
    "fast_bfloat16",
    "slower_because",
    "with_isa",
]
