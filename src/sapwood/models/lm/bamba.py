"""Bamba. Source: IBM, Princeton and UIUC 2024, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import FeedForward, Layer, Mixer, Sublayer
from sapwood.layers.mamba2 import Mamba2
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.lm.state_space import BAMBA_FIELDS, dt_range, with_states


class BambaForCausalLM(Architecture):
    """Mamba 2 in most layers, attention that rotates half of each head in the others, and gated
    feed-forwards in all."""

    absent: ClassVar = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262_144,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5,
        "mamba_conv_bias": True,
    }
    has_windows = False
    can_be_rescaled = False
    names = Names(
        norm="model.final_layernorm",
        feed_forward="feed_forward",
        before_feed_forward="pre_ff_layernorm",
    )

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        attending = config.hf.get("attn_layer_indices") or []
        every = range(config.num_layers)
        if not isinstance(attending, list) or not set(every).issuperset(attending):
            raise ConfigError(
                f"config.json must have indices of its {config.num_layers} layers in "
                f"'attn_layer_indices', got {attending!r}"
            )
        layers = tuple(index for index in every if index not in attending)
        return with_states(config, BAMBA_FIELDS.layout(config.hf), layers)

    def layer(self, index: int) -> Layer:
        if index not in self.config.layers_with_states:
            return super().layer(index)
        mixer = Sublayer(
            name="mamba", body=self.mamba(index), before=self.named_norm(self.names.before_mixer)
        )
        return Layer(mixer, self.feed_forward_sublayer(index))

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias)

    def mamba(self, index: int) -> Mixer:
        hf = self.config.hf
        return Mamba2(
            self.build,
            index,
            self.config.hidden_size,
            BAMBA_FIELDS.layout(hf),
            bias=switch(hf, "mamba_proj_bias"),
            conv_bias=switch(hf, "mamba_conv_bias"),
            norm_eps=self.config.norm_eps,
            dt_range=dt_range(hf),
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(bias=self.config.mlp_bias)
