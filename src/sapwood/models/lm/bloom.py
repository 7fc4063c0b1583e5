"""BLOOM. Source: BigScience Workshop 2022, arXiv:2211.05100."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.heads import QkvForm, alibi_slopes
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.norm import Norm
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Architecture, Names


class BloomForCausalLM(Architecture):
    """ALiBi instead of rotation, LayerNorms (one before the first layer), no gates, biases."""

    absent: ClassVar = {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    spelled: ClassVar = {
        "hidden_size": ("n_embed", "hidden_size"),
        "max_position_embeddings": "seq_length",
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
        "num_key_value_heads": (),
        "rms_norm_eps": "layer_norm_epsilon",
    }
    names = Names(
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        layers="transformer.h",
        norm="transformer.ln_f",
        mixer="self_attention",
    )
    lacks_prefix = "transformer."
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        size = 4 * integer(found, "hidden_size")
        return {**found, "intermediate_size": size, "hidden_act": "gelu_pytorch_tanh"}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if switch(hf, "apply_residual_connection_post_layernorm"):
            raise ConfigError(
                "config.json asks for apply_residual_connection_post_layernorm, which is not "
                "implemented"
            )
        return replace(super().read(hf), has_alibi=True)

    def embedding_norm(self) -> Norm:
        return self.norm()

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def rope_of(self, index: int) -> RopeConfig | None:
        return None

    def mixer(self, index: int) -> Mixer:
        return self.attention(
            index,
            qkv_bias=True,
            o_bias=True,
            alibi=alibi_slopes(self.config.num_heads),
            form=QkvForm(fused="query_key_value", grouped=True),
            o_name="dense",
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("dense_h_to_4h", "dense_4h_to_h", bias=True)
