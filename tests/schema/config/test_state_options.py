"""How states are kept: whole pages apart, in chosen numbers, and only for models that keep some."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import (
    ACTIVATIONS,
    RECURRENT,
    CacheGroup,
    CacheKind,
    CacheTensor,
    keys_and_values,
)
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.config.state_options import refuse_idle_state_options, state_interval

FULL = keys_and_values([0], num_kv_heads=1, head_dim=8)
WINDOWS = CacheTensor((4, 2), ACTIVATIONS)
CONVOLUTION = CacheGroup(kind=CacheKind.STATE, layers=(1,), tensors={"conv": WINDOWS})
RECURRENCE = CacheGroup(
    kind=CacheKind.STATE,
    layers=(1,),
    tensors={"conv": WINDOWS, "state": CacheTensor((2, 4, 4), RECURRENT)},
)


def interval_of(page_size: int = 16, *, on_cpu: bool = True, **asked: Any) -> Any:
    return state_interval(MemoryConfig(**asked), page_size, context_length=1000, on_cpu=on_cpu)


@pytest.mark.parametrize(("page_size", "expected"), [(1, 256), (16, 256), (48, 288), (1024, 1024)])
def test_the_default_is_whole_pages_and_has_a_reason(page_size: int, expected: int) -> None:
    interval, why = interval_of(page_size)
    assert interval == expected
    assert why is not None
    on_gpu, _ = interval_of(page_size, on_cpu=False)
    assert on_gpu >= 1024
    assert on_gpu % page_size == 0


def test_what_is_asked_for_is_taken() -> None:
    assert interval_of(mamba_track_interval=64) == (64, None)
    assert interval_of(mamba_track_interval=64, mamba_scheduler_strategy="extra_buffer")[0] == 64


def test_without_buffers_no_place_is_inside_the_context() -> None:
    interval, why = interval_of(mamba_scheduler_strategy="no_buffer")
    assert interval == 1008
    assert "no_buffer" in why


def test_without_buffers_there_is_no_distance() -> None:
    with pytest.raises(ConfigError, match="leave --mamba-track-interval out"):
        interval_of(mamba_scheduler_strategy="no_buffer", mamba_track_interval=64)


def test_pages_are_whole() -> None:
    with pytest.raises(ConfigError, match="multiple of --page-size 16"):
        interval_of(mamba_track_interval=24)


@pytest.mark.parametrize(
    ("groups", "asked", "message"),
    [
        ((FULL,), {"mamba_track_interval": 32}, "layers of tiny keep no states"),
        ((FULL,), {"max_mamba_cache_size": 4}, "--max-mamba-cache-size is 4"),
        ((), {"max_mamba_cache_size": 4}, "keep no states"),
        ((FULL,), {"mamba_full_memory_ratio": 0.5}, "--mamba-full-memory-ratio is 0.5"),
        ((FULL,), {"mamba_scheduler_strategy": "no_buffer"}, "strategy is no_buffer"),
        ((FULL,), {"mamba_ssm_dtype": "bfloat16"}, "no recurrent states"),
        ((FULL, CONVOLUTION), {"mamba_ssm_dtype": "bfloat16"}, "no recurrent states"),
    ],
)
def test_what_would_change_nothing_is_refused(
    groups: tuple[CacheGroup, ...], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_idle_state_options(MemoryConfig(**asked), groups, model="tiny")


def test_what_has_a_meaning_is_accepted() -> None:
    asked = MemoryConfig(
        mamba_track_interval=32, mamba_full_memory_ratio=2.0, mamba_ssm_dtype="bfloat16"
    )
    refuse_idle_state_options(asked, (FULL, RECURRENCE), model="tiny")
    refuse_idle_state_options(MemoryConfig(), (FULL,), model="tiny")
    refuse_idle_state_options(MemoryConfig(max_mamba_cache_size=9), (CONVOLUTION,), model="tiny")


@pytest.mark.parametrize("name", ["mamba_track_interval", "max_mamba_cache_size"])
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_numbers_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is {value}"):
        MemoryConfig(**{name: value})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mamba_full_memory_ratio": 0.0}, "ratio is 0.0 but must be above 0"),
        ({"mamba_full_memory_ratio": 1.0, "max_mamba_cache_size": 4}, "leave one out"),
        ({"mamba_scheduler_strategy": "some"}, "mamba-scheduler-strategy"),
        ({"mamba_ssm_dtype": "float16"}, "mamba-ssm-dtype"),
    ],
)
def test_contradictions_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**asked)
