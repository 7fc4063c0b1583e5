"""OPT. Source: Zhang et al. 2022, arXiv:2205.01068."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.embedding import LearnedPositions
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.norm import Norm
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Architecture, Names


class OPTForCausalLM(Architecture):
    """Learned positions, the first of which is in row 2; LayerNorms, no gates, biases."""

    absent: ClassVar = {
        "do_layer_norm_before": True,
        "enable_bias": True,
        "hidden_act": "relu",
        "layer_norm_elementwise_affine": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    spelled: ClassVar = {
        "hidden_act": "activation_function",
        "intermediate_size": "ffn_dim",
        "num_key_value_heads": (),
    }
    names = Names(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        feed_forward="",
        before_mixer="self_attn_layer_norm",
        before_feed_forward="final_layer_norm",
    )
    lacks_prefix = "model."
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        if integer(hf, "word_embed_proj_dim", default=config.hidden_size) != config.hidden_size:
            raise ConfigError(
                "config.json has a word_embed_proj_dim unlike hidden_size, which is not implemented"
            )
        if not switch(config.hf, "do_layer_norm_before"):
            raise ConfigError(
                "config.json has norms after the layers (do_layer_norm_before is false), which is "
                "not implemented"
            )
        return config

    def positions(self) -> LearnedPositions:
        config = self.config
        length = config.rope.trained_length
        return LearnedPositions(self.build, length, config.hidden_size, offset=2)

    def rope_of(self, index: int) -> RopeConfig | None:
        return None

    def norm(self, size: int | None = None) -> Norm:
        is_learned = switch(self.config.hf, "layer_norm_elementwise_affine")
        return self.layer_norm(size, is_learned=is_learned)

    def mixer(self, index: int) -> Mixer:
        bias = switch(self.config.hf, "enable_bias")
        return self.attention(index, qkv_bias=bias, o_bias=bias, o_name="out_proj")

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("fc1", "fc2", bias=switch(self.config.hf, "enable_bias"))
