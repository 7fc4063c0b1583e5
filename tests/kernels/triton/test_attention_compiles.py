"""What the interpreter runs must compile for the H200, and fit in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.tiers import long_only

SHARED_MEMORY = 227 * 1024
REGISTERS = 65_536
CASES = {
    "decode 1 128 16 bfloat16 dense plain parts": (75 * 1024, 128),
    "decode 1 128 16 bfloat16 int8 plain parts": (75 * 1024, 128),
    "extend 512 128 16 bfloat16 dense plain one": (SHARED_MEMORY, 256),
    "extend 512 128 16 bfloat16 fp8_e4m3 plain one": (SHARED_MEMORY, 256),
    "shared 512 256 64 bfloat16 dense traits parts": (SHARED_MEMORY, 256),
    "shared 512 256 64 bfloat16 fp8_e5m2 traits parts": (SHARED_MEMORY, 256),
    "merge 1 128 1 any any any parts": (16 * 1024, 128),
    "extend 16 128 16 bfloat16 dense tree parts": (SHARED_MEMORY, 256),
}
"""Kernel, tokens per tile, head size, page size, dtype, cache -> shared memory at most, threads."""

FEW = [list(CASES)[index] for index in (1, 2, 5, 6, 7)]
"""Each kernel once, of them some with a cache in 8 bits."""

_PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


@pytest.mark.skipif(not _PTXAS.exists(), reason="this triton has no compiler for NVIDIA GPUs")
@pytest.mark.parametrize("cases", [FEW, *long_only(list(CASES))], ids=len)
def test_kernels_compile_and_fit(cases: list[str]) -> None:
    script = Path(__file__).with_name("compile_for_h200.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *cases],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = [json.loads(line) for line in done.stdout.splitlines()]
    assert [found["case"] for found in taken] == cases
    for found in taken:
        shared_memory, threads = CASES[found["case"]]
        assert found["shared"] <= shared_memory, found
        assert found["registers"] * threads <= REGISTERS, found
        assert found["stack"] <= 64, found  # more would be registers that are spilled in the loop
