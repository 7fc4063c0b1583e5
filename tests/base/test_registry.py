from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.base.registry import Registry


def test_a_name_is_loaded_when_asked_for() -> None:
    registry: Registry[type] = Registry("clock", {"manual": "sapwood.base.clock:ManualClock"})
    assert registry.get("manual").__name__ == "ManualClock"


def test_the_error_lists_what_is_known() -> None:
    registry: Registry[type] = Registry("clock", {"b": "x:y", "a": "x:z"})
    with pytest.raises(ConfigError, match="unknown clock 'c'; known: a, b"):
        registry.get("c")
