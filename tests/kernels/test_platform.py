"""Facts of a machine, read from a made-up /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import psutil

from sapwood.kernels.platform import read_platform

CPUINFO = """processor\t: 0
model name\t: Example 9000
flags\t\t: fpu sse avx2 avx512f avx512_bf16 hypervisor

processor\t: 1
model name\t: Example 9000
flags\t\t: fpu sse avx2 avx512f avx512_bf16 hypervisor
"""


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_facts_of_a_limited_container(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", CPUINFO)
    write(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "1048576\n")
    facts = read_platform(tmp_path)
    assert facts.cpu_name == "Example 9000"
    assert facts.cpu_flags == {"avx2", "avx512f", "avx512_bf16"}
    assert facts.num_cores == 1
    assert facts.memory_bytes == 1048576


def test_no_limits_and_no_cpuinfo(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    facts = read_platform(tmp_path)
    assert facts.cpu_name == ""
    assert facts.cpu_flags == frozenset()
    assert facts.num_cores >= 1
    assert facts.memory_bytes == psutil.virtual_memory().total


def test_arm_spells_its_features_otherwise(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm bf16\n")
    flags = {"asimd", "asimddp", "sve", "i8mm", "bf16"}
    assert read_platform(tmp_path).cpu_flags == flags


def test_this_machine() -> None:
    facts = read_platform()
    assert facts.num_cores >= 1
    assert facts.memory_bytes > 2**20
    assert facts.device == ("cuda" if facts.device_names else "cpu")
