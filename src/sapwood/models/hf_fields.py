"""Reads fields of a config.json and checks their types. No torch.

A field that is null counts as absent, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.base.errors import ConfigError


def integer(config: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    """An integer field; ConfigError if it is of another type, or absent without a default."""
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config.json must have an integer {name!r}, got {value!r}")
    return value


def epsilon(config: Mapping[str, Any], name: str, *, default: float) -> float:
    """The number that a norm adds to the mean of squares, which must be between 0 and 1."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"config.json must have a number from 0 to 1 as {name!r}, got {value!r}")
    return float(value)


def switch(config: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; false if it is absent."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json must have true or false as {name!r}, got {value!r}")
    return bool(value)
