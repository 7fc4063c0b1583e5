"""Where the Triton kernels say they can serve."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from sapwood.kernels.attention_batch import CHOSEN_KEYS, LATENT
from sapwood.kernels.registry import Need, select_kernels
from sapwood.kernels.triton.factory import TRITON

NEED = Need(device="cuda", dtype=torch.bfloat16, head_dim=64, page_size=16)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_a_gpu_is_served_and_the_cpu_is_not() -> None:
    assert TRITON.why_not(NEED) is None
    assert TRITON.why_not(replace(NEED, kv_dtype=torch.int8)) is None
    assert TRITON.why_not(replace(NEED, attention=frozenset({LATENT, CHOSEN_KEYS}))) is None
    assert select_kernels(NEED).kernels.name == "triton"
    refusals = select_kernels(replace(NEED, device="cpu")).refusals
    assert refusals["triton"] == "they run on cuda, not on cpu"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": torch.float64}, "torch.float64 is not float32, bfloat16 or float16"),
        ({"head_dim": 320}, "head size 320 is above 256"),
        (
            {"kv_dtype": torch.float16},
            "the KV cache is torch.float16, neither torch.bfloat16 nor in 8 bits",
        ),
        (
            {"kv_dtype": torch.int8, "head_dim": 65},
            "an 8-bit KV cache needs an even head size, not 65",
        ),
        ({"device": "mps"}, "they run on cuda, not on mps"),
        ({"attention": frozenset({"dreams"})}, "its attention has no dreams"),
    ],
)
def test_limits(fields: dict[str, Any], reason: str) -> None:
    assert TRITON.why_not(replace(NEED, **fields)) == reason


def test_machines_that_lack_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 7.5, and they need 8.0" in (TRITON.why_not(NEED) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TRITON.why_not(NEED) == "torch finds no CUDA device"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "built for AMD's" in (TRITON.why_not(NEED) or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "sapwood[gpu]"' in (TRITON.why_not(NEED) or "")
