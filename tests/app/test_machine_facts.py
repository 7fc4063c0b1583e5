from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.app.wiring import machine_facts
from sapwood.base.errors import ConfigError
from sapwood.kernels.platform import read_platform


def test_the_memory_is_that_of_the_device_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform = replace(read_platform(), device="cuda")
    memory = {0: (10, 20), 1: (30, 40)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
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
