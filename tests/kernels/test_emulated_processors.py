"""The module on processors that lack what it has kernels for, as qemu emulates them.

Where an instruction is run that the emulated processor does not have, the process ends with SIGILL:
when the module loads, when a table is chosen, or in a step. qemu has no AVX-512, AVX-VNNI or AMX.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sapwood.kernels.cpu import CpuKernels
from tests.kernels.emulated_engine import STORAGE, run
from tests.kernels.native_build import native_build
from tests.tiers import long_only
from tests.tiny import save_qwen3

QEMU = shutil.which("qemu-x86_64")
TABLES = {
    "core2duo": "generic",
    "Nehalem": "generic",
    "SandyBridge": "generic",  # AVX, but not AVX2
    "Haswell": "avx2",
    "EPYC-Milan": "avx2",
}
"""Emulated processor -> the table that it must get."""
ENGINES = ("Nehalem", "Haswell", *long_only("EPYC-Milan"))
"""Those that run a whole engine; torch's import alone takes 15 s on each, and each table is enough
for every change."""
LIMIT_S = 240.0
SAME_LIMIT_S = 1800.0
"""Two engines per way of storing weights, on a machine that does other things too."""
CLOSE = {"float32": 1e-4, "bfloat16": 0.05}
"""Log probabilities by one table, on the emulated processor and on this one: torch's own ops (the
embedding, the logarithm) may add in another order."""
KERNEL_TESTS = (
    "tests/kernels/test_cpu_kernels.py::TestRows",
    "tests/kernels/test_cpu_kernels.py::TestLinear",
)

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates processors of x86-64"),
    pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed (Debian: qemu-user)"),
    pytest.mark.skipif(not CpuKernels.usable_isas(), reason="the extension is not built"),
    pytest.mark.timeout(2 * LIMIT_S),
]

LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(json.dumps([native.usable_isas(), native.Context("", 1).isa]))
"""
"""Loads the module alone: without torch that takes a second."""


def emulate(processor: str, args: Sequence[str], limit_s: float = LIMIT_S) -> str:
    """What Python prints there; AssertionError, with what it said, if it ends in another way."""
    command = [str(QEMU), "-cpu", processor, sys.executable, *args]
    # Where OpenBLAS is told which kernels this machine takes, the emulated one may lack them.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=limit_s, check=False, env=environment
    )
    said = f"{processor}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    return done.stdout


def module_path() -> Path:
    from sapwood.kernels.cpu import _native

    return Path(str(_native.__file__))


@pytest.mark.parametrize(("processor", "table"), TABLES.items())
def test_the_module_chooses_what_the_processor_can_run(processor: str, table: str) -> None:
    usable, chosen = json.loads(emulate(processor, ["-S", "-c", LOAD, str(module_path())]))
    assert chosen == usable[-1] == table


@pytest.mark.parametrize("processor", ENGINES)
def test_an_engine_computes_on_older_processors_what_it_computes_here(
    processor: str, tmp_path: Path
) -> None:
    model = str(save_qwen3(tmp_path / "model"))
    told = json.loads(emulate(processor, ["-m", "tests.kernels.emulated_engine", model]))
    table = TABLES[processor]
    assert told["usable"][-1] == table
    for name, options in STORAGE.items():
        note, logprobs = told["found"][name]
        assert f"with {table} instructions" in note, (processor, name, note)
        _, expected = run(model, kernels=f"cpu:{table}", **options)
        assert len(logprobs) == len(expected)
        furthest = max(abs(a - b) for a, b in zip(logprobs, expected, strict=True))
        assert furthest < CLOSE[options["dtype"]], (processor, name)


@pytest.mark.timeout(SAME_LIMIT_S)
@pytest.mark.long  # minutes; tests/app/test_same_answers.py does so with the same tables here
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
def test_answers_depend_on_the_request_alone(processor: str, tmp_path: Path) -> None:
    model = str(save_qwen3(tmp_path / "model"))
    told = emulate(processor, ["-m", "tests.kernels.emulated_engine", model, "same"], SAME_LIMIT_S)
    assert json.loads(told) == []


@pytest.mark.long  # 50 s; the engines above run the same table there, and here it is always tested
def test_kernels_of_avx2_agree_with_the_reference_on_a_processor_without_avx512() -> None:
    args = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "avx2", *KERNEL_TESTS]
    assert " passed" in emulate("Haswell", args)


def test_a_module_from_a_newer_machine_falls_back_to_the_generic_table(tmp_path: Path) -> None:
    """Compiled as `native` there: for AVX-512 and the generic set, but not for AVX2."""
    moved = native_build().linked(["generic", "avx512_bf16"], tmp_path)
    usable, chosen = json.loads(emulate("EPYC-Milan", ["-S", "-c", LOAD, str(moved)]))
    assert (usable, chosen) == (["generic"], "generic")
