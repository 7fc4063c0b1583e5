"""The ops in C++ (csrc/), with the instruction set chosen when the process starts."""

from sapwood.kernels.cpu.native import CpuKernels

__all__ = ["CpuKernels"]
