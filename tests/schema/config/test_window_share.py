"""--swa-full-tokens-ratio: only for models with windows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import CacheGroup, keys_and_values
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.config.resolve import resolve
from sapwood.schema.config.window_share import check_window_share
from tests.schema.config.test_resolve import CPU, MODEL, reasons

FULL = keys_and_values([0], num_kv_heads=1, head_dim=8)
WINDOW = keys_and_values([1], num_kv_heads=1, head_dim=8, window=64)


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("groups", [(FULL, WINDOW), (WINDOW,)])
def test_models_with_windows_take_it(share: float | None, groups: tuple[CacheGroup, ...]) -> None:
    assert check_window_share(share, groups, model="tiny") == share


def test_others_refuse_it() -> None:
    assert check_window_share(None, (FULL,), model="tiny") is None
    with pytest.raises(ConfigError, match=r"--swa-full-tokens-ratio is 0\.5, but no layer of tiny"):
        check_window_share(0.5, (FULL,), model="tiny")


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_it_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="must be above 0, up to 1"):
        MemoryConfig(swa_full_tokens_ratio=share)


def test_it_says_how_the_pools_share_the_memory() -> None:
    model = replace(MODEL, cache=(FULL, WINDOW), context_length=512, max_context_length=512)
    memory = MemoryConfig(swa_full_tokens_ratio=0.25, max_total_tokens=64_000, page_size=16)
    _, decisions = resolve(EngineConfig(memory=memory), CPU, model)
    assert reasons(decisions)["max_total_tokens"] == (
        "asked for; all 64000 tokens in 1 layer, 2.0 MiB; 16000 tokens for windows of 64 in 1 "
        "layer, 0.5 MiB: 0.25 of all tokens, by --swa-full-tokens-ratio"
    )
    short = replace(model, context_length=64, max_context_length=64)
    with pytest.raises(
        ConfigError, match="no layer of small has a window shorter than the context"
    ):
        resolve(EngineConfig(memory=memory), CPU, short)
