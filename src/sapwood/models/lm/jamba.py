"""Jamba. Source: Lieber et al. 2024, arXiv:2403.19887."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import Layer, Mixer, Sublayer
from sapwood.layers.mamba1 import Mamba1, Mamba1Layout
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Names
from sapwood.models.lm.mamba import step_rank
from sapwood.models.lm.mixture import MixtureArchitecture


class JambaForCausalLM(MixtureArchitecture):
    """Mamba in most layers and attention without positions in the others; experts in some."""

    absent: ClassVar = {
        "max_position_embeddings": 262_144,
        "num_key_value_heads": 8,
        "mamba_conv_bias": True,
        "num_experts": 16,
    }
    has_windows = False
    can_be_rescaled = False
    names = Names(
        norm="model.final_layernorm",
        feed_forward="feed_forward",
        before_feed_forward="pre_ff_layernorm",
    )
    router_name = "router"

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        attending = _every(config.hf, "attn_layer", 8, 4, config.num_layers)
        layers = tuple(index for index in range(config.num_layers) if index not in attending)
        layout = _layout(config.hf)
        return replace(
            config,
            states=(layout.cache_group(layers),) if layers else (),
            state_layer_parameters=layout.num_parameters(config.hidden_size),
        )

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        number = integer(config.hf, "num_experts")
        chosen = _every(config.hf, "expert_layer", 2, 1, config.num_layers) if number > 1 else ()
        return ExpertsConfig(
            num_experts=number,
            num_per_token=min(number, integer(config.hf, "num_experts_per_tok", default=2)),
            intermediate_size=config.intermediate_size,
            dense_layers=tuple(index for index in range(config.num_layers) if index not in chosen),
        )

    def layer(self, index: int) -> Layer:
        if index not in self.config.layers_with_states:
            return super().layer(index)
        mixer = Sublayer(
            name="mamba", body=self.mamba(index), before=self.named_norm(self.names.before_mixer)
        )
        return Layer(mixer, self.feed_forward_sublayer(index))

    def rope_of(self, index: int) -> RopeConfig | None:
        return None

    def mamba(self, index: int) -> Mixer:
        hf = self.config.hf
        return Mamba1(
            self.build,
            index,
            self.config.hidden_size,
            _layout(hf),
            bias=switch(hf, "mamba_proj_bias"),
            conv_bias=switch(hf, "mamba_conv_bias"),
            norm_eps=self.config.norm_eps,
        )


def _layout(hf: Mapping[str, Any]) -> Mamba1Layout:
    return Mamba1Layout(
        channels=integer(hf, "mamba_expand", default=2) * integer(hf, "hidden_size"),
        state_size=integer(hf, "mamba_d_state", default=16),
        step_rank=step_rank(hf, "mamba_dt_rank"),
        conv_length=integer(hf, "mamba_d_conv", default=4),
    )


def _every(
    hf: Mapping[str, Any], name: str, period: int, offset: int, num_layers: int
) -> tuple[int, ...]:
    """Layers that come once in a period; ConfigError unless it is positive."""
    period = integer(hf, f"{name}_period", default=period)
    offset = integer(hf, f"{name}_offset", default=offset)
    if not 0 <= offset < period:
        raise ConfigError(
            f"config.json's {name}_offset is {offset} but must be from 0 to {name}_period - 1, "
            f"which is {period - 1}"
        )
    return tuple(index for index in range(num_layers) if index % period == offset)
