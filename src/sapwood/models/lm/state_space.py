"""What models with Mamba 2 layers have in common: how their config.json says the heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.layers.mamba2 import Mamba2Layout
from sapwood.models.config import FULL, DecoderConfig
from sapwood.models.hf_fields import integer

LINEAR = "linear_attention"
"""Kind of the layers with states, in config.json's layer_types as transformers writes them now."""

MAMBA_KINDS = {"mamba": LINEAR, "mamba2": LINEAR, "attention": FULL}
"""First names of kinds of layers -> the present ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Fields:
    """Names of the fields of config.json that say the heads, and what they mean if absent.

    heads, head_dim, groups, state_size, length  (name, number if absent); None for a head_dim that
             follows from the width
    """

    heads: tuple[str, int]
    head_dim: tuple[str, int | None]
    groups: tuple[str, int]
    state_size: tuple[str, int]
    length: tuple[str, int]
    expand: tuple[str, int]

    def layout(self, hf: Mapping[str, Any], *, width: int | None = None) -> Mamba2Layout:
        """`width`: channels of all heads, if not `expand` times the hidden size.

        Raises ConfigError if the numbers do not fit each other."""
        heads = integer(hf, self.heads[0], default=self.heads[1])
        expand = integer(hf, self.expand[0], default=self.expand[1])
        width = expand * integer(hf, "hidden_size") if width is None else width
        name, absent = self.head_dim
        said = {**hf, name: None} if hf.get(name) == "auto" else hf
        if heads < 1:
            raise ConfigError(f"config.json's {self.heads[0]} is {heads} but must be >= 1")
        return Mamba2Layout(
            num_heads=heads,
            head_dim=integer(said, name, default=width // heads if absent is None else absent),
            num_groups=integer(hf, self.groups[0], default=self.groups[1]),
            state_size=integer(hf, self.state_size[0], default=self.state_size[1]),
            conv_length=integer(hf, self.length[0], default=self.length[1]),
        )


BAMBA_FIELDS = Mamba2Fields(
    heads=("mamba_n_heads", 128),
    head_dim=("mamba_d_head", None),
    groups=("mamba_n_groups", 1),
    state_size=("mamba_d_state", 256),
    length=("mamba_d_conv", 4),
    expand=("mamba_expand", 2),
)
"""As Bamba, Falcon H1 and Granite 4 spell them."""


def dt_range(hf: Mapping[str, Any], name: str = "time_step_limit") -> tuple[float, float]:
    """The smallest and the largest time step; ConfigError unless there are two numbers."""
    said = hf.get(name)
    if said is None:
        return 0.0, float("inf")
    is_pair = isinstance(said, list | tuple) and len(said) == 2
    numbers = [_limit(number) for number in said] if is_pair else []
    if not numbers or not numbers[0] <= numbers[1]:
        raise ConfigError(f"config.json must have two numbers in order as {name!r}, got {said!r}")
    return numbers[0], numbers[1]


def _limit(value: Any) -> float:
    # Some files have Infinity as a text, or as an object around one.
    if isinstance(value, Mapping):
        value = value.get("__float__")
    try:
        return float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return float("nan")


def kinds_of(
    hf: Mapping[str, Any], known: tuple[str, ...], *names: str, num_layers: int
) -> list[str] | None:
    """The kind of each layer, as the first of these fields that is there says; None if none is.

    Raises ConfigError for a list of another length, or with a kind that is not known."""
    said = next((hf[name] for name in names if hf.get(name) is not None), None)
    if said is None:
        return None
    kinds = [str(MAMBA_KINDS.get(kind, kind)) for kind in said] if isinstance(said, list) else []
    if len(kinds) != num_layers or not set(known).issuperset(kinds):
        raise ConfigError(
            f"config.json must have one of {', '.join(known)} for each of its {num_layers} layers "
            f"in {names[0]!r}, got {said!r}"
        )
    return kinds


def with_states(
    config: DecoderConfig, layout: Mamba2Layout, layers: tuple[int, ...], **changes: Any
) -> DecoderConfig:
    """The config with states in these layers, and with other changes."""
    return replace(
        config,
        states=(layout.cache_group(layers),) if layers else (),
        state_layer_parameters=layout.num_parameters(config.hidden_size),
        **changes,
    )
