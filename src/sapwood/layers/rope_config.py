"""The rotary position embedding that a model's config describes. No torch.

Both forms in which checkpoints carry it are read: `rope_parameters`, and the older `rope_scaling`
beside a top-level `rope_theta`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sapwood.base.errors import ConfigError

DEFAULT_THETA = 10_000.0
ROPE_BY_KIND = "rope_by_kind"
"""Where `parted_by_kind` leaves the rope parameters of all kinds of layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions are divided by `factor`. Source: Chen et al. 2023, arXiv:2306.15595."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling:
    """The base grows with the length beyond the trained maximum (NTK-aware); see layers/rotary."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Long waves are slowed by `factor`, short ones kept, those between blended.

    original_length  positions that the model was trained on before scaling
    low, high        waves longer than original_length / low are long, shorter than / high short
    Source: Llama 3.1's model code."""

    factor: float
    low: float
    high: float
    original_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Frequencies between two numbers of rotations are blended; cos and sin are scaled.

    original_length      positions that the model was trained on before scaling
    beta_fast, beta_slow  rotations over original_length above which a frequency is kept, and below
                         which it is divided by factor
    truncate             round the blended range outwards to whole dimensions
    attention_factor     multiplies cos and sin
    Source: Peng et al. 2023, arXiv:2309.00071."""

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LongropeScaling:
    """Each frequency is divided by a number of its own; see layers/rotary.

    short, long       the divisors for contexts up to original_length, and for longer ones
    original_length   positions that the model was trained on before scaling
    short_attention_factor, long_attention_factor  multiply cos and sin, likewise
    Source: Ding et al. 2024, arXiv:2402.13753."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    short_attention_factor: float
    long_attention_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProportionalScaling:
    """Only the first `share` of the pairs turns, as fast as in a rotation of all, and slower by
    `factor`. Source: Gemma 4's model code, Google 2026."""

    factor: float
    share: float


Scaling = (
    LinearScaling
    | DynamicScaling
    | Llama3Scaling
    | YarnScaling
    | LongropeScaling
    | ProportionalScaling
)
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """A rotary position embedding.

    theta                 base of the wave lengths
    partial_factor        share of a head's entries that is rotated
    trained_length        the config's max_position_embeddings
    scaling               how positions beyond the trained length are reached; None: not at all
    """

    theta: float
    trained_length: int
    partial_factor: float = 1.0
    scaling: Scaling | None = None

    @property
    def max_context_length(self) -> int:
        """The longest context that the embedding is meant for."""
        match self.scaling:
            case LinearScaling() | DynamicScaling():
                return int(self.trained_length * self.scaling.factor)
            case YarnScaling():
                stretched = int(self.scaling.original_length * self.scaling.factor)
                return max(self.trained_length, stretched)
            case _:
                return self.trained_length

    def switch_length(self, context_length: int) -> int | None:
        """The length of a text beyond which it is rotated otherwise, from its first token on, where
        that context is served; None: all texts are rotated alike."""
        match self.scaling:
            case DynamicScaling() if self.scaling.factor > 1.0:
                length = self.trained_length
            case LongropeScaling() if self.scaling.short != self.scaling.long:
                length = self.scaling.original_length
            case _:
                return None
        return length if length < context_length else None

    def rotary_dim(self, head_dim: int) -> int:
        """Number of a head's entries that are rotated; ConfigError if it is not even."""
        rotary_dim = int(head_dim * self.partial_factor)
        if rotary_dim < 2 or rotary_dim % 2:
            raise ConfigError(
                f"the config rotates {rotary_dim} of {head_dim} entries of a head "
                f"(partial_rotary_factor {self.partial_factor}), but they must pair up"
            )
        return rotary_dim

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> RopeConfig:
        """Read a model's config; ConfigError if it asks for a scaling that is not implemented."""
        said = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(said, Mapping):
            raise ConfigError(f"the config's rope parameters are {said!r} instead of an object")
        if any(isinstance(value, Mapping) for value in said.values()):
            raise ConfigError(
                "the config has different rope_parameters for each kind of layer "
                f"({', '.join(sorted(said))}), which the supported architectures do not use"
            )
        trained_length = int(config["max_position_embeddings"])
        theta = _first(said, config, "rope_theta", DEFAULT_THETA)
        partial = _first(said, config, "partial_rotary_factor", 1.0)
        share = _positive(partial, "partial_rotary_factor")
        scaling = _read_scaling(said, config, trained_length)
        if isinstance(scaling, ProportionalScaling):
            scaling, share = replace(scaling, share=share), 1.0
        return RopeConfig(
            theta=_positive(theta, "rope_theta"),
            trained_length=trained_length,
            partial_factor=share,
            scaling=scaling,
        )


def parted_by_kind(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config, where rope_parameters are those of layers with full attention; if there are
    others for other kinds of layers, all are in ROPE_BY_KIND."""
    said = config.get("rope_parameters")
    if not isinstance(said, Mapping) or not isinstance(said.get("full_attention"), Mapping):
        return dict(config)
    return {**config, "rope_parameters": said["full_attention"], ROPE_BY_KIND: said}


def _first(said: Mapping[str, Any], config: Mapping[str, Any], name: str, default: float) -> Any:
    """The first value among rope parameters and config; null counts as absent."""
    given = said.get(name) if said.get(name) is not None else config.get(name)
    return default if given is None else given


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"the config's {name} is {value!r} but must be a number above 0")
    return float(value)


def _read_scaling(
    said: Mapping[str, Any], config: Mapping[str, Any], trained_length: int
) -> Scaling | None:
    kind = said.get("rope_type") or said.get("type") or "default"
    # Some configs have the original length outside of the rope parameters; that one counts.
    original_length = int(
        config.get("original_max_position_embeddings")
        or said.get("original_max_position_embeddings")
        or trained_length
    )
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=_factor(said, kind))
        case "dynamic":
            return DynamicScaling(factor=_factor(said, kind))
        case "llama3":
            return Llama3Scaling(
                factor=_factor(said, kind),
                low=_number(said, kind, "low_freq_factor"),
                high=_number(said, kind, "high_freq_factor"),
                original_length=original_length,
            )
        case "yarn":
            given = said.get("factor")
            return YarnScaling(
                factor=trained_length / original_length if given is None else _factor(said, kind),
                original_length=original_length,
                beta_fast=float(said.get("beta_fast") or 32),
                beta_slow=float(said.get("beta_slow") or 1),
                truncate=bool(said.get("truncate", True)),
                attention_factor=_optional(said, kind, "attention_factor"),
                mscale=_optional(said, kind, "mscale"),
                mscale_all_dim=_optional(said, kind, "mscale_all_dim"),
            )
        case "proportional":
            factor = _factor(said, kind) if said.get("factor") is not None else 1.0
            return ProportionalScaling(factor=factor, share=1.0)
        case "longrope" | "su":
            return _longrope(said, trained_length, original_length)
        case _:
            raise ConfigError(
                f"the config asks for rope type {kind!r}; implemented: {', '.join(KINDS)}"
            )


def _longrope(
    said: Mapping[str, Any], trained_length: int, original_length: int
) -> LongropeScaling:
    divisors = []
    for name in ("short_factor", "long_factor"):
        found = said.get(name)
        if not isinstance(found, list) or not found:
            raise ConfigError(f"the config's rope type 'longrope' needs a list {name!r}")
        divisors.append(tuple(_positive(value, name) for value in found))
    given = _optional(said, "longrope", "factor")
    factor = trained_length / original_length if given is None else given
    said_factor = _optional(said, "longrope", "attention_factor")
    if said_factor is None:
        grows = factor > 1 and original_length > 1
        said_factor = math.sqrt(1 + math.log(factor) / math.log(original_length)) if grows else 1.0
    short, long = (_optional(said, "longrope", name) for name in ("short_mscale", "long_mscale"))
    return LongropeScaling(
        short=divisors[0],
        long=divisors[1],
        original_length=original_length,
        short_attention_factor=said_factor if short is None else short,
        long_attention_factor=said_factor if long is None else long,
    )


def _factor(said: Mapping[str, Any], kind: str) -> float:
    factor = _number(said, kind, "factor")
    if factor < 1.0:
        raise ConfigError(f"the config's rope factor is {factor} but must be >= 1 for {kind!r}")
    return factor


def _number(said: Mapping[str, Any], kind: str, name: str) -> float:
    value = said.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"the config's rope type {kind!r} needs a number {name!r}, got {value!r}")
    return float(value)


def _optional(said: Mapping[str, Any], kind: str, name: str) -> float | None:
    return None if said.get(name) is None else _number(said, kind, name)
