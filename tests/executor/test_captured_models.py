"""Captured steps of models of all kinds give what the models give op by op."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.executor.captured_walk import RESTART, Walk
from tests.executor.device_style import DeviceStyle
from tests.models.lm.cases import CASES
from tests.tiers import examples, sweep

KINDS = {
    "windows": "gemma3",
    "windows, sinks and experts": "gpt_oss",
    "short convolutions": "lfm2",
    "delta rule and experts": "qwen3_next",
    "Mamba 2": "bamba",
    "latent rows and experts": "deepseek_v2",
    "chosen keys": "deepseek_v32, few keys",
    "attention in chunks": "llama4",
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


@sweep(strength=1, case=[*CASES])
def test_every_architecture_can_be_captured(case: str) -> None:
    walk = Walk(case, DeviceStyle())
    replayed = [walk.step(step) for step in STEPS]
    assert all(replayed)
    walk.check_caches()


@cache
def walk_of(case: str) -> Walk:
    return Walk(case, DeviceStyle())


NEWS = st.lists(st.sampled_from([0, 1, 1, 1, 2, 5, 12, RESTART]), min_size=4, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(20))
@given(steps=st.lists(NEWS, min_size=1, max_size=8))
def test_random_steps_give_what_the_ops_give(kind: str, steps: list[list[int]]) -> None:
    """Requests grow, end early, and leave their places to others; every step is replayed."""
    walk = walk_of(KINDS[kind])
    walk.reset()
    assert all(walk.step(step) is not False for step in steps)
    walk.check_caches()
