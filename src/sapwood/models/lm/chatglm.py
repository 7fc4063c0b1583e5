"""ChatGLM 2 and 3, and GLM-4-9B. Source: GLM Team 2024, arXiv:2406.12793."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.norm import Norm
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.architecture import Architecture, Names


class ChatGLMModel(Architecture):
    """Rotation of neighbouring pairs in half of each head, fused layers, and names of its own."""

    absent: ClassVar = {
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "post_layer_norm": True,
        "rms_norm_eps": 1e-5,
        "rmsnorm": True,
    }
    spelled: ClassVar = {
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "mlp_bias": "add_bias_linear",
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "multi_query_group_num",
        "rms_norm_eps": "layernorm_epsilon",
        "vocab_size": "padded_vocab_size",
    }
    names = Names(
        embedding="transformer.embedding.word_embeddings",
        layers="transformer.encoder.layers",
        norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        mixer="self_attention",
    )
    ignorable = ("transformer.rotary_pos_emb.inv_freq",)
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        if found.get("multi_query_attention") is False:
            found["num_key_value_heads"] = integer(found, "num_attention_heads")
        theta = 10_000.0 * number(found, "rope_ratio", default=1.0)
        return {**found, "partial_rotary_factor": 0.5, "rope_theta": theta, "hidden_act": "silu"}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        if (
            switch(config.hf, "apply_residual_connection_post_layernorm")
            or not switch(config.hf, "post_layer_norm")
            or hf.get("pre_seq_len")
        ):
            raise ConfigError(
                "config.json asks for apply_residual_connection_post_layernorm, pre_seq_len, or no "
                "post_layer_norm; they are not implemented"
            )
        return config

    def norm(self, size: int | None = None) -> Norm:
        is_rms = switch(self.config.hf, "rmsnorm")
        return self.rms_norm(size) if is_rms else self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        config = self.config
        return self.attention(
            index,
            qkv_bias=config.mlp_bias or switch(config.hf, "add_qkv_bias"),
            o_bias=config.mlp_bias,
            form=QkvForm(fused="query_key_value", pairs=config.rope.rotary_dim(config.head_dim)),
            o_name="dense",
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(
            bias=self.config.mlp_bias,
            names=("gate", "up", "dense_4h_to_h"),
            fused="dense_h_to_4h",
        )
