"""What was compiled per instruction set, and what is said where a faster set is not used."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.cpu.instruction_sets import FEATURES, unused_set
from tests.kernels.native_build import ROOT, NativeBuild, native_build

_X86 = ["generic", "avx2", "avx512", "avx512_bf16"]
_ARCHITECTURE = re.compile(
    r'if\(CMAKE_SYSTEM_PROCESSOR MATCHES "([^"]+)"\)(.*?)(?=^elseif|^endif)',
    re.DOTALL | re.MULTILINE,
)
_DECLARED = re.compile(r"^ *instruction_set\((\w+)([^)]*)\)", re.MULTILINE)
_WEAK = re.compile(r"^[0-9a-f]+ [Wu] (\S+)$", re.MULTILINE)
_RUNS_AT_LOAD = re.compile(r"\.(init_array|ctors|preinit_array)\b")
_WIDE_REGISTER = re.compile(r"%[yz]mm\d")


@pytest.fixture
def build() -> NativeBuild:
    return native_build()


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def declared_sets(machine: str | None = None) -> dict[str, bool]:
    """Each set of CMakeLists.txt, of one architecture or of all, and whether a machine may have it
    as its native one."""
    text = (ROOT / "CMakeLists.txt").read_text("utf-8")
    declared = {}
    for pattern, block in _ARCHITECTURE.findall(text):
        if machine is None or re.match(pattern, machine):
            for name, arguments in _DECLARED.findall(block):
                declared[name] = "MACROS" in arguments
    return declared


def weak_functions(objects: Sequence[Path]) -> set[str]:
    """Names of which the linker keeps one copy of many."""
    return {name for path in objects for name in _WEAK.findall(output("nm", str(path)))}


def test_every_set_that_a_machine_may_run_has_its_features() -> None:
    runnable = [name for name, is_native in declared_sets().items() if is_native]
    assert runnable == list(FEATURES)


def test_a_build_for_tests_has_every_set(build: NativeBuild) -> None:
    """A compiler that is too old leaves sets out: their tests would be silently missing."""
    every = {"generic", *declared_sets(platform.machine())}
    assert set(CpuKernels.compiled_isas()) == set(build.sets()) == every


def test_nothing_compiled_for_an_instruction_set_runs_when_the_module_loads(
    build: NativeBuild,
) -> None:
    for name in build.sets():
        for path in build.of_set(name):
            sections = output("readelf", "--section-headers", "--wide", str(path))
            assert not _RUNS_AT_LOAD.search(sections), path
            assert "_GLOBAL__sub_I" not in output("nm", str(path)), path


def test_no_function_of_an_instruction_set_can_take_the_place_of_another(
    build: NativeBuild,
) -> None:
    """Of a function that several files define (a template, an inline function) the linker keeps one
    copy. Those of a set must lie in its namespace: others would reach whoever lacks its flags."""
    for name in build.sets():
        own = f"7sapwood{len(name)}{name}"
        foreign = {symbol for symbol in weak_functions(build.of_set(name)) if own not in symbol}
        assert foreign == set(), name


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has them")
def test_what_is_compiled_once_has_no_wide_registers(build: NativeBuild) -> None:
    for path in build.without_set():
        assert not _WIDE_REGISTER.search(output("objdump", "-d", str(path))), path


@pytest.mark.parametrize(
    ("features", "usable", "words"),
    [
        ("avx512_bf16", _X86, None),
        ("avx512_bf16", ["generic", "avx2"], "avx512_bf16 would be faster, but the module was"),
        ("amx", _X86, "amx would be faster, but the module was"),
        ("avx2", ["generic"], "make kernels"),
        ("avx2_vnni", ["generic", "avx2"], "avx2_vnni would be faster"),
    ],
)
def test_a_faster_set_that_is_not_compiled(
    features: str, usable: list[str], words: str | None
) -> None:
    said = unused_set(FEATURES[features], compiled=usable, usable=usable)
    assert said is None if words is None else said is not None and words in said


def test_a_faster_set_that_is_compiled_but_refused() -> None:
    said = unused_set(FEATURES["amx"], compiled=[*_X86, "amx"], usable=_X86)
    assert said is not None
    assert "does not lend its registers" in said


def test_a_processor_without_any_set() -> None:
    assert unused_set({"sse2"}, compiled=["generic"], usable=["generic"]) is None
