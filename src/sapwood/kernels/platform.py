"""Facts of this machine, read once and never changed: what `sapwood check` prints."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sapwood.base.errors import ConfigError
from sapwood.kernels.accelerators import (
    ACCELERATORS,
    Accelerator,
    accelerator_of,
    best_accelerator,
)

_NOTABLE_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""CPU features that some kernel may use, as Linux spells them in /proc/cpuinfo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """The hardware that this process may use.

    device        torch's device type for the model by default: "cuda" or another accelerator's, if
                  there is one, else "cpu"
    machine       instruction set, as uname says it: "x86_64", "aarch64", …
    cpu_name      the processor's marketing name; "" if the system does not tell
    cpu_flags     the processor's notable features; empty where there is no /proc/cpuinfo
    num_cores     cores that this process may run on, by affinity and cgroup quota, at least 1
    memory_bytes  main memory, or the cgroup's limit if that is less
    device_names  the name of each device of that type that is visible; of CPUs none
    """

    device: str
    machine: str
    cpu_name: str
    cpu_flags: frozenset[str]
    num_cores: int
    memory_bytes: int
    device_names: tuple[str, ...]


def read_platform(root: Path = Path("/")) -> Platform:
    """Read this machine's facts from the folders proc and sys below `root`."""
    cpu_name, flags = _read_cpuinfo(root / "proc/cpuinfo")
    best = best_accelerator()
    cgroup = root / "sys/fs/cgroup"
    limit = _read_limit(cgroup / "memory.max")
    total = psutil.virtual_memory().total
    return Platform(
        device=best or "cpu",
        machine=platform.machine(),
        cpu_name=cpu_name,
        cpu_flags=flags,
        num_cores=_usable_cores(cgroup / "cpu.max"),
        memory_bytes=total if limit is None else min(total, limit),
        device_names=() if best is None else ACCELERATORS.get(best).names(),
    )


def find_device(asked: str | None, platform: Platform) -> torch.device:
    """The device called `asked`; for None and "auto" the best one. ConfigError if there is none."""
    if asked is None or asked == "auto":
        return torch.device(platform.device)
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(
            f"--device is {asked!r}, which is no device; use cpu, cuda, cuda:0 … or auto"
        ) from error
    accelerator = accelerator_of(device)
    if accelerator is not None:
        names = accelerator.names()
        if (device.index or 0) >= len(names):
            raise ConfigError(f"--device is {asked}, but {_what_is_here(accelerator, platform)}")
    return device


def _what_is_here(accelerator: Accelerator, platform: Platform) -> str:
    """What this machine has instead of the device that was asked for, and the way out."""
    names = accelerator.names()
    if names:
        return (
            f"this machine has {len(names)} {accelerator.title} devices ({', '.join(names)}); use "
            f"a number from 0 to {len(names) - 1}"
        )
    return (
        f"torch {torch.__version__} {accelerator.why_none()}, or use --device cpu, which is here: "
        f"{platform.cpu_name or platform.machine}, {platform.num_cores} cores"
    )


def device_memory(device: torch.device, platform: Platform) -> tuple[int, int]:
    """(bytes that are free at this moment, all bytes)"""
    accelerator = accelerator_of(device)
    if accelerator is not None:
        return accelerator.memory(device).free_and_total()
    return min(psutil.virtual_memory().available, platform.memory_bytes), platform.memory_bytes


def _read_cpuinfo(path: Path) -> tuple[str, frozenset[str]]:
    if not path.exists():
        return "", frozenset()
    name, flags = "", frozenset[str]()
    for line in path.read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not name:
            name = value
        elif key in ("flags", "Features") and not flags:
            flags = frozenset(value.split()).intersection(_NOTABLE_FLAGS)
    return name, flags


def _usable_cores(cpu_max: Path) -> int:
    """Cores by affinity, or by the cgroup's "<quota or max> <period>" if that is less."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    if cpu_max.exists():
        quota, _, period = cpu_max.read_text().strip().partition(" ")
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _read_limit(path: Path) -> int | None:
    """A cgroup limit in bytes, or None where there is no limit."""
    if not path.exists():
        return None
    text = path.read_text().strip()
    return None if text == "max" else int(text)
