"""Jet-Nemotron: gated delta nets whose values are convolved with weights made of each token in most
layers, Qwen2's attention with or without a window in the others.

Source: Gu et al. 2025, arXiv:2508.15884, and its model code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.delta import DeltaLayout
from sapwood.layers.jet import JetBlock
from sapwood.layers.layer import Mixer
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import epsilon, integer, number
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.delta import checked

ATTENTION, JET, WINDOW = "attn", "jet", "swa"
"""Kinds of layers in config.json's layer_types; the last two are fields of
efficient_attention_config, too."""


class JetNemotronForCausalLM(Architecture):
    """Attention has biases on q, k and v, and nowhere else, whatever the config says."""

    absent: ClassVar = {
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    }
    has_windows = False  # those of efficient_attention_config count instead
    can_be_rescaled = False  # a JetBlock has more layers after its norm than q, k and v

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        return {"layer_types": [ATTENTION] * integer(found, "num_hidden_layers"), **found}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        windowed, jet = _layers(config, WINDOW), _layers(config, JET)
        if windowed:
            window = integer(_section(config.hf, WINDOW), "window_size")
            config = replace(config, sliding_window=window, windowed_layers=windowed)
        if not jet:
            return config
        layout = _layout(config.hf)
        _eps(config.hf)
        keys, _, values = layout.sizes
        generator = _generator_size(config.hf)
        columns = 2 * keys + 3 * values + 2 * layout.num_heads + generator
        return replace(
            config,
            states=(layout.cache_group(jet),),
            state_layer_parameters=config.hidden_size * columns
            + generator * values * layout.length,
        )

    def mixer(self, index: int) -> Mixer:
        config = self.config
        if index not in config.layers_with_states:
            return self.attention(index, qkv_bias=True)
        return JetBlock(
            self.build,
            index,
            config.hidden_size,
            _layout(config.hf),
            generator_size=_generator_size(config.hf),
            eps=_eps(config.hf),
        )


def _layers(config: DecoderConfig, wanted: str) -> tuple[int, ...]:
    """The layers of a kind; ConfigError if layer_types is not a list of known kinds."""
    kinds, count = config.hf["layer_types"], config.num_layers
    known = (ATTENTION, JET, WINDOW)
    if not isinstance(kinds, list) or len(kinds) != count or any(one not in known for one in kinds):
        raise ConfigError(
            f"config.json must have {', '.join(known[:2])} or {WINDOW} for each of its {count} "
            f"layers in 'layer_types', got {kinds!r}"
        )
    return tuple(index for index, kind in enumerate(kinds) if kind == wanted)


def _section(hf: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """What efficient_attention_config says of layers of a kind."""
    sections = hf.get("efficient_attention_config")
    section = sections.get(kind) if isinstance(sections, Mapping) else None
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"config.json has {kind!r} in 'layer_types' and so must have an object as {kind!r} in "
            f"'efficient_attention_config', got {sections!r}"
        )
    return section


def _layout(hf: Mapping[str, Any]) -> DeltaLayout:
    section = _section(hf, JET)
    heads = integer(section, "num_heads", default=6)
    key_dim = integer(section, "head_dim", default=256)
    expansion = number(section, "expand_v", default=2.0)
    width = min(key_dim, 2**31) * expansion
    value_dim = round(min(width, 2.0**31))
    # Files have a rounded number, such as 2.6666666667.
    if not math.isclose(value_dim, width, rel_tol=1e-5):
        raise ConfigError(
            f"config.json's expand_v {expansion} times its head_dim {key_dim} must be an integer "
            "below 2^31"
        )
    return checked(
        DeltaLayout(
            num_key_heads=heads,
            num_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            length=integer(section, "conv_size", default=4),
            convolves_keys=False,
        )
    )


def _generator_size(hf: Mapping[str, Any]) -> int:
    """Outputs of the first of the two layers that make a convolution's weights."""
    values = _layout(hf).sizes[2]
    reduction = integer(_section(hf, JET), "dconv_generator_reduction", default=8)
    if not 1 <= reduction <= values:
        raise ConfigError(
            f"config.json's dconv_generator_reduction is {reduction} but must be from 1 to {values}"
        )
    return values // reduction


def _eps(hf: Mapping[str, Any]) -> float:
    """Of the norm over a head's outputs; files have a text, such as "1e-5"."""
    section = _section(hf, JET)
    said = section.get("norm_eps")
    if not isinstance(said, str):
        return epsilon(section, "norm_eps", default=1e-5)
    try:
        return epsilon({"norm_eps": float(said)}, "norm_eps", default=1e-5)
    except ValueError as error:
        raise ConfigError(
            f"config.json must have a number from 0 to 1 as 'norm_eps', got {said!r}"
        ) from error
