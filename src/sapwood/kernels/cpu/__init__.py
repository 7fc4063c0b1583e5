"""The ops in C++ (csrc/), with the instruction set chosen when the process starts."""

from sapwood.kernels.cpu.machine import fast_bfloat16, slower_because
from sapwood.kernels.cpu.native import CpuKernels, with_isa

__all__ = [
    "CpuKernels",
    "fast_bfloat16",
    "slower_because",
    "with_isa",
]
