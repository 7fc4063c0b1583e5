"""Reads fields of a config.json and checks their types. No torch.

A field that is null counts as absent, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sapwood.base.errors import ConfigError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
"""Names of activations in config.json -> values of kernels/activations.Activation."""


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


def number(config: Mapping[str, Any], name: str, *, default: float | None = None) -> float:
    """A number above 0; ConfigError if it is none, or absent without a default."""
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"config.json must have a number above 0 as {name!r}, got {value!r}")
    return float(value)


def optional_number(config: Mapping[str, Any], name: str) -> float | None:
    """The same, or None if the field is absent or null."""
    return None if config.get(name) is None else number(config, name)


def activation(config: Mapping[str, Any], name: str, *, default: str) -> str:
    """The activation of feed-forward layers: one of the values of ACTIVATIONS."""
    said = config.get(name) or default
    if said not in ACTIVATIONS:
        raise ConfigError(
            f"the config asks for activation {said!r}; implemented: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[said]


def switch(config: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; false if it is absent."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json must have true or false as {name!r}, got {value!r}")
    return bool(value)
