"""The C++ kernels for ARM processors, compiled and run on any machine.

A cross compiler builds native/compare_tables.cpp, which compares every op of every instruction set
with plain loops, and an emulator runs the program as processors with more and fewer instructions.
On an ARM machine test_cpu_kernels.py and its neighbours test the same kernels through Python, at
all sizes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tiers import long_only

_ROOT = Path(__file__).parents[2]
_COMPILER = "aarch64-linux-gnu-g++"
_EMULATOR = "qemu-aarch64"
_TOOLS = (_COMPILER, _EMULATOR, "cmake", "make")
_MISSING = [tool for tool in _TOOLS if shutil.which(tool) is None]
_LIBRARIES = Path("/usr/aarch64-linux-gnu")  # where the cross compiler's own are

pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}"),
    pytest.mark.timeout(900),
]

_PROCESSORS = {
    "cortex-a72": ["generic", "neon"],
    "neoverse-n1": ["generic", "neon", "neon_dotprod"],
    "max": ["generic", "neon", "neon_dotprod", "neon_bf16"],
}
"""What the emulator calls a processor -> the instruction sets that it has, slowest first."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("arm")
    configure = [
        "cmake", "-S", _ROOT, "-B", build, "-DSAPWOOD_COMPARE_TABLES=ON",
        "-DSAPWOOD_OPTIMISATION=-O1",  # compiles in a quarter of the time that -O3 takes
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={_COMPILER}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    compile_all = ["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)]
    subprocess.run(compile_all, check=True, stdout=subprocess.DEVNULL)
    return build / "compare_tables"


@pytest.mark.parametrize("processor", _PROCESSORS)
def test_the_sets_that_a_processor_has(program: Path, processor: str) -> None:
    assert said(program, processor, "--list") == [" ".join(_PROCESSORS[processor])]


@pytest.mark.parametrize("processor", ["max", *long_only("cortex-a72", "neoverse-n1")])
def test_every_op_of_every_instruction_set(program: Path, processor: str) -> None:
    # The generic set is plain C++, which the tests on this machine compare.
    isas, *failed = said(program, processor, *_PROCESSORS[processor][1:])
    assert failed == []
    assert isas.split() == _PROCESSORS[processor]


def said(program: Path, processor: str, *options: str) -> list[str]:
    """Lines; an instruction that the processor lacks would have ended the program."""
    command = [_EMULATOR, "-cpu", processor, "-L", str(_LIBRARIES), str(program), *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode in (0, 1), f"ended with {run.returncode}\n{run.stdout}\n{run.stderr}"
    return run.stdout.splitlines()
