"""The instruction sets that a processor could run, whatever the compiled module has of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_NEON = frozenset({"asimd"})
_BF16 = _AVX512 | {"avx512_vnni", "avx512_bf16"}

FEATURES: Mapping[str, frozenset[str]] = {
    "avx2": _AVX2,
    "avx2_vnni": _AVX2 | {"avx_vnni"},
    "avx512": _AVX512,
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "avx512_bf16": _BF16,
    "amx": _BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    "neon": _NEON,
    "neon_dotprod": _NEON | {"asimddp"},
    "neon_bf16": _NEON | {"asimddp", "i8mm", "bf16"},
}
"""What Linux says of a processor that can run each set (in /proc/cpuinfo), the slowest set first.

The module finds out for itself what it can run (csrc/instruction_sets.cpp); this is for saying what
it lacks."""


def unused_set(
    features: Collection[str], *, compiled: Collection[str], usable: Collection[str]
) -> str | None:
    """Which faster instruction set this processor has, why it is not used and what helps; or None.

    features  the processor's, as Linux names them
    compiled  the sets that the module has
    usable    those of them that the module found to run here
    """
    runnable = [name for name, needed in FEATURES.items() if needed <= set(features)]
    if not runnable or runnable[-1] in usable:
        return None
    fastest = runnable[-1]
    if fastest in compiled:
        return (
            f"{fastest} would be faster, but the system does not lend its registers or its first "
            "product was wrong"
        )
    return (
        f"{fastest} would be faster, but the module was compiled without it: compile it on this "
        "machine, with make kernels or pip install --editable ."
    )
