"""What a processor is worth to the compiled kernels, before any of them is made."""

from __future__ import annotations

from sapwood.kernels.cpu.instruction_sets import unused_set
from sapwood.kernels.cpu.native import CpuKernels
from sapwood.kernels.platform import Platform

_BFLOAT16_ISAS = frozenset({"avx512_bf16", "amx", "amx_emulated", "neon_bf16"})


def slower_because(platform: Platform, only: str | None) -> str | None:
    """Why the compiled kernels are slower than this processor allows, and what helps; None if they
    are not, are not asked for, or are asked to use a certain instruction set."""
    usable = CpuKernels.usable_isas()
    if (only or "cpu") != "cpu" or not usable:
        return None
    return unused_set(platform.cpu_flags, compiled=CpuKernels.compiled_isas(), usable=usable)


def fast_bfloat16(platform: Platform, only: str | None) -> bool:
    """Whether matrix products of bfloat16 on the CPU have instructions of their own: in the
    compiled kernels that would serve, or for torch where these were not built or are not asked
    for."""
    asked, _, variant = (only or "cpu").partition(":")
    usable = CpuKernels.usable_isas()
    if asked != "cpu" or not usable:
        return not platform.cpu_flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
    return (variant or usable[-1]) in _BFLOAT16_ISAS
