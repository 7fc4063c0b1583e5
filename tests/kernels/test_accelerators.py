"""Kinds of devices that other packages add: found, measured and named as CUDA's are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.kernels.accelerators import (
    ACCELERATORS,
    CUDA,
    TorchAccelerator,
    TorchMemory,
    accelerator_of,
    best_accelerator,
    capture_on,
    memory_of,
)
from sapwood.kernels.platform import device_memory, find_device, read_platform
from sapwood.kernels.recording import CannotRecord
from sapwood.kernels.transfer import SideQueue, runs_ahead, synchronize

XPU = torch.device("xpu")


class Xpu(TorchAccelerator):
    kind = "xpu"
    title = "XPU"


@dataclass
class FakeModule:
    """Stands for torch's module of a kind, with as many devices."""

    count: int = 2
    allocated: int = 10
    calls: list[str] = field(default_factory=list)

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def get_device_name(self, index: int) -> str:
        return f"X{index}"

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 30 + (device.index or 0), 40

    def memory_allocated(self, device: Any = None) -> int:
        return self.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.allocated + 7

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.calls.append("reset")

    def synchronize(self, device: Any = None) -> None:
        self.calls.append("synchronize")

    def Stream(self, device: Any) -> Any:  # noqa: N802 - torch's name
        return SimpleNamespace(synchronize=lambda: self.calls.append("stream"), device=device)

    def stream(self, stream: Any) -> Any:
        return torch.inference_mode()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    """As if a package had added XPUs, of which this machine has two."""
    fake, plain = FakeModule(), torch.get_device_module
    monkeypatch.setattr(
        torch,
        "get_device_module",
        lambda device: fake if "xpu" in str(device) else plain(device),
    )
    monkeypatch.setitem(ACCELERATORS._targets, "xpu", f"{__name__}:FOUND")
    return fake


FOUND = Xpu()


def test_an_added_kind_is_found_when_there_is_no_gpu(module: FakeModule) -> None:
    assert accelerator_of(XPU) is FOUND
    assert accelerator_of(torch.device("cpu")) is None
    assert best_accelerator() == "xpu"
    facts = read_platform()
    assert (facts.device, facts.device_names) == ("xpu", ("X0", "X1"))
    assert find_device(None, facts) == XPU
    assert find_device("xpu:1", facts) == torch.device("xpu", 1)
    assert device_memory(torch.device("xpu", 1), facts) == (31, 40)
    with pytest.raises(ConfigError, match=r"2 XPU devices \(X0, X1\); use a number from 0 to 1"):
        find_device("xpu:2", facts)


def test_its_absence_is_explained(module: FakeModule) -> None:
    module.count = 0
    assert best_accelerator() is None
    with pytest.raises(ConfigError, match=r"finds no XPU device; .* or use --device cpu"):
        find_device("xpu", read_platform())
    assert FOUND.allocated_bytes() == 0


def test_memory_queues_and_captures_are_its_own(module: FakeModule) -> None:
    memory = memory_of(XPU)
    assert isinstance(memory, TorchMemory)
    assert memory.peak_bytes_of(lambda: module.calls.append("run")) == 7
    assert module.calls == ["synchronize", "reset", "run", "synchronize"]
    assert FOUND.allocated_bytes() == 10
    assert runs_ahead(XPU)
    module.calls.clear()
    synchronize(XPU)
    with SideQueue(XPU).used():
        module.calls.append("work")
    assert module.calls == ["synchronize", "work", "stream"]
    with pytest.raises(CannotRecord, match="xpu"):
        capture_on(XPU)


def test_a_kind_that_nobody_added_has_no_memory_of_its_own() -> None:
    with pytest.raises(ConfigError, match="unknown accelerator 'cpu'; known: cuda"):
        memory_of(torch.device("cpu"))


def test_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in CUDA.why_none()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "finds no CUDA device" in CUDA.why_none()


def test_cuda_comes_before_other_kinds(module: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    names: Callable[[], tuple[str, ...]] = lambda: ("A",)  # noqa: E731
    monkeypatch.setattr(CUDA, "names", names)
    assert best_accelerator() == "cuda"
    assert read_platform(Path("/")).device_names == ("A",)
