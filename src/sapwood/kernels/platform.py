"""Facts of this machine, read once and never changed: what `sapwood check` prints."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from sapwood.base.errors import ConfigError

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

    device        torch's device type for the model by default: "cuda" if there is one, else "cpu"
    machine       instruction set, as uname says it: "x86_64", "aarch64", …
    cpu_name      the processor's marketing name; "" if the system does not tell
    cpu_flags     the processor's notable features; empty where there is no /proc/cpuinfo
    num_cores     cores that this process may run on, by affinity and cgroup quota, at least 1
    memory_bytes  main memory, or the cgroup's limit if that is less
    cuda_names    the name of each visible CUDA device
    """

    device: str
    machine: str
    cpu_name: str
    cpu_flags: frozenset[str]
    num_cores: int
    memory_bytes: int
    cuda_names: tuple[str, ...]


def read_platform(root: Path = Path("/")) -> Platform:
    """Read this machine's facts from the folders proc and sys below `root`."""
    cpu_name, flags = _read_cpuinfo(root / "proc/cpuinfo")
    names = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    cgroup = root / "sys/fs/cgroup"
    limit = _read_limit(cgroup / "memory.max")
    total = psutil.virtual_memory().total
    return Platform(
        device="cuda" if names else "cpu",
        machine=platform.machine(),
        cpu_name=cpu_name,
        cpu_flags=flags,
        num_cores=_usable_cores(cgroup / "cpu.max"),
        memory_bytes=total if limit is None else min(total, limit),
        cuda_names=names,
    )


class DeviceMemory(Protocol):
    """The memory of a device."""

    device: torch.device

    def free_and_total(self) -> tuple[int, int]:
        """(free, total) bytes; free memory is used by no program, nor cached by this one."""
        ...

    def peak_bytes_of(self, run: Callable[[], None]) -> int:
        """Call `run`. Returns the bytes that it used at its peak, beside those in use before."""
        ...


class CudaMemory:
    """The memory of a CUDA device, as torch's allocator sees it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free_and_total(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)

    def peak_bytes_of(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


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
    num_devices = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_devices:
        raise ConfigError(f"--device is {asked}, but {_what_cuda_has(num_devices, platform)}")
    return device


def _what_cuda_has(num_devices: int, platform: Platform) -> str:
    """What this machine has instead of the device that was asked for, and the way out."""
    if num_devices:
        names = ", ".join(platform.cuda_names)
        return (
            f"this machine has {num_devices} CUDA devices ({names}); use a number from 0 to "
            f"{num_devices - 1}"
        )
    here = f"{platform.cpu_name or platform.machine}, {platform.num_cores} cores"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a build with it "
            "(https://pytorch.org/get-started/locally), or use --device cpu, which is here: "
            f"{here}"
        )
    return (
        f"torch {torch.__version__} finds no CUDA device; see whether nvidia-smi does, and "
        f"what CUDA_VISIBLE_DEVICES says, or use --device cpu, which is here: {here}"
    )


def device_memory(device: torch.device, platform: Platform) -> tuple[int, int]:
    """(bytes that are free at this moment, all bytes)"""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
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
