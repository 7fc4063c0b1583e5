"""Granite 4. Source: IBM 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.layer import FeedForward, Layer, Mixer, Sublayer
from sapwood.layers.mamba2 import Mamba2
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import FULL, DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.granite_moe_shared import GraniteMoeSharedForCausalLM
from sapwood.models.lm.state_space import BAMBA_FIELDS, LINEAR, dt_range, kinds_of, with_states


class GraniteMoeHybridForCausalLM(GraniteMoeSharedForCausalLM):
    """Granite whose layers mostly have Mamba 2 instead of attention, and a shared expert beside the
    others; the small models have the shared one only."""

    absent: ClassVar = {
        "max_position_embeddings": 2048,
        "mamba_conv_bias": True,
        "num_local_experts": 8,
        "shared_intermediate_size": GraniteMoeSharedForCausalLM.shared_size,
    }
    can_be_rescaled = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        kinds = kinds_of(
            config.hf, (LINEAR, FULL), "layer_types", "layers_block_type",
            num_layers=config.num_layers,
        )  # fmt: skip
        layers = tuple(
            index for index in range(config.num_layers) if kinds is None or kinds[index] == LINEAR
        )
        config = with_states(config, BAMBA_FIELDS.layout(config.hf), layers)
        if integer(config.hf, "num_local_experts") > 0:
            return config
        size = integer(config.hf, "shared_intermediate_size")
        return replace(config, experts=None, intermediate_size=size)

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        number = integer(config.hf, "num_local_experts")
        if number < 1:  # only the shared one, which then is a dense feed-forward: see `read`
            return ExpertsConfig(num_experts=1, num_per_token=1, intermediate_size=1)
        return super().experts_in(config)

    def layer(self, index: int) -> Layer:
        if index not in self.config.layers_with_states:
            return super().layer(index)
        mixer = Sublayer(
            name="mamba",
            body=self.mamba(index),
            before=self.named_norm(self.names.before_mixer),
            scale=self.residual_scale,
        )
        return Layer(mixer, self.feed_forward_sublayer(index))

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

    def rope_of(self, index: int) -> RopeConfig | None:
        return self.config.rope if self.config.hf.get("position_embedding_type") == "rope" else None

    def feed_forward_sublayer(self, index: int) -> Sublayer[FeedForward]:
        sublayer = super().feed_forward_sublayer(index)
        if self.config.experts is not None:
            return sublayer
        return replace(sublayer, name=f"{sublayer.name}.{self.shared_name}")

    def feed_forward(self, index: int) -> FeedForward:
        if self.config.experts is None:
            return self.shared_expert(self.config.intermediate_size)
        return super().feed_forward(index)
