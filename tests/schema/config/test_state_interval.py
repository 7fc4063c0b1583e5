"""The distance of kept states: whole pages, and only for models that keep states."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import CacheGroup, CacheKind, CacheTensor, keys_and_values
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.config.state_interval import state_interval

FULL = keys_and_values([0], num_kv_heads=1, head_dim=8)
STATE = CacheGroup(kind=CacheKind.STATE, layers=(1,), tensors={"conv": CacheTensor((4, 2))})


def resolved(
    groups: tuple[CacheGroup, ...] = (FULL, STATE),
    page_size: int = 16,
    *,
    on_cpu: bool = True,
    **asked: Any,
) -> tuple[int | None, str | None]:
    return state_interval(
        MemoryConfig(**asked), page_size, groups=groups, model="tiny", on_cpu=on_cpu
    )


@pytest.mark.parametrize(("page_size", "expected"), [(1, 256), (16, 256), (48, 288), (1024, 1024)])
def test_the_default_is_whole_pages_and_has_a_reason(page_size: int, expected: int) -> None:
    interval, why = resolved(page_size=page_size)
    assert interval == expected
    assert why is not None
    on_gpu, _ = resolved(page_size=page_size, on_cpu=False)
    assert on_gpu is not None
    assert on_gpu >= 1024
    assert on_gpu % page_size == 0
    assert resolved((FULL,), page_size) == (None, None), "nothing is kept"


def test_what_is_asked_for_is_taken() -> None:
    assert resolved(mamba_track_interval=64) == (64, None)


@pytest.mark.parametrize(
    ("groups", "asked", "message"),
    [
        ((FULL, STATE), {"mamba_track_interval": 24}, "multiple of --page-size 16"),
        ((FULL,), {"mamba_track_interval": 32}, "layers of tiny keep no states"),
        ((FULL,), {"max_mamba_cache_size": 4}, "--max-mamba-cache-size is 4"),
        ((), {"max_mamba_cache_size": 4}, "keep no states"),
    ],
)
def test_what_does_not_fit_is_refused(
    groups: tuple[CacheGroup, ...], asked: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(groups, **asked)


@pytest.mark.parametrize("name", ["mamba_track_interval", "max_mamba_cache_size"])
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_numbers_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is {value}"):
        MemoryConfig(**{name: value})
