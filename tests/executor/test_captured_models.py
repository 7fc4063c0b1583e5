"""Captured steps of models of all kinds give what the models give op by op."""

from __future__ import annotations

from functools import cache

import pytest

from tests.executor.captured_walk import RESTART, Walk
from tests.executor.device_style import DeviceStyle
from tests.models.lm.cases import CASES

KINDS = {
    "windows": "gemma3",
    "windows, sinks and experts": "gpt_oss",
    "short convolutions": "lfm2",
    "delta rule and experts": "qwen3_next",
    "Mamba 2": "bamba",
    "latent rows and experts": "deepseek_v2",
}

STEPS = [
    [9, 1, 0, 3],
    [1, 1, 1, 1],
    [1, 0, 1, 0],
    [1, 12, 0, 1],
    [1, 1, RESTART, 1],
    [0, 0, 7, 0],
    [1, 1, 1, 1],
    [12, 1, 1, 1],
    [1, 1, 1, 0],
    [1, 1, 0, 0],
]


@cache
def walk_of(case: str) -> Walk:
    return Walk(case, DeviceStyle())


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_can_be_captured(case: str) -> None:
    walk = Walk(case, DeviceStyle())
    replayed = [walk.step(step) for step in STEPS]
    assert all(replayed)
    walk.check_caches()
