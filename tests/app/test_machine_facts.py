from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.app.building.resolving import machine_facts
from sapwood.base.errors import ConfigError
from sapwood.kernels.platform import read_platform


def test_the_memory_is_that_of_the_device_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform = replace(read_platform(), device="cuda")
    memory = {0: (10, 20), 1: (30, 40)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: memory[device.index or 0])
    second = machine_facts(platform, "cuda:1")
    assert (second.device, second.available_bytes, second.memory_bytes) == ("cuda:1", 30, 40)
    assert machine_facts(platform, None).memory_bytes == 20
    on_cpu = machine_facts(platform, "cpu")
    assert (on_cpu.device, on_cpu.memory_bytes) == ("cpu", platform.memory_bytes)


@pytest.mark.parametrize("device", ["cuda:7", "toaster"])
def test_a_device_that_is_not_here_is_named(device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        machine_facts(read_platform(), device)


def test_auto_is_the_best_one() -> None:
    platform = replace(read_platform(), device="cpu")
    assert machine_facts(platform, "auto").device == machine_facts(platform, None).device == "cpu"


@pytest.mark.parametrize(
    ("num_devices", "built_with", "says"),
    [
        (0, None, "is built without CUDA; install a build with it"),
        (0, "13.0", "finds no CUDA device; see whether nvidia-smi does"),
        (2, "13.0", r"this machine has 2 CUDA devices \(A, B\); use a number from 0 to 1"),
    ],
)
def test_what_was_found_instead_of_the_device(
    monkeypatch: pytest.MonkeyPatch, num_devices: int, built_with: str | None, says: str
) -> None:
    platform = replace(read_platform(), device_names=("A", "B")[:num_devices])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", "AB".__getitem__)
    monkeypatch.setattr(torch.version, "cuda", built_with)
    with pytest.raises(ConfigError, match=says):
        machine_facts(platform, "cuda:2")
