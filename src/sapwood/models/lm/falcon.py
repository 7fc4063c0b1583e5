"""Falcon 1 and 2. Source: Almazrouei et al. 2023, arXiv:2311.16867."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.heads import QkvForm, alibi_slopes
from sapwood.layers.layer import FeedForward, Layer, Mixer, ParallelLayer, Sublayer
from sapwood.layers.norm import Norm
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Architecture, Names


class FalconForCausalLM(Architecture):
    """LayerNorms, no gates; rotation or ALiBi; attention and feed-forward beside each other, with
    one norm or two, or one after the other."""

    absent: ClassVar = {
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "multi_query": True,
        "parallel_attn": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    spelled: ClassVar = {
        "hidden_act": "activation",
        "hidden_size": ("hidden_size", "n_embed"),
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
        "rms_norm_eps": "layer_norm_epsilon",
    }
    names = Names(
        embedding="transformer.word_embeddings",
        layers="transformer.h",
        norm="transformer.ln_f",
        mixer="self_attention",
    )
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        found.setdefault("intermediate_size", 4 * integer(found, "hidden_size"))
        if not switch(found, "new_decoder_architecture"):
            num_heads = integer(found, "num_attention_heads")
            found["num_key_value_heads"] = 1 if switch(found, "multi_query") else num_heads
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        if switch(config.hf, "new_decoder_architecture") and not switch(config.hf, "parallel_attn"):
            raise ConfigError(
                "config.json has new_decoder_architecture without parallel_attn, which is not "
                "implemented"
            )
        return replace(config, has_alibi=switch(config.hf, "alibi"))

    def rope_of(self, index: int) -> RopeConfig | None:
        return None if self.config.has_alibi else self.config.rope

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def layer(self, index: int) -> Layer:
        hf = self.config.hf
        if not switch(hf, "parallel_attn"):
            return super().layer(index)
        is_new = switch(hf, "new_decoder_architecture")
        if integer(hf, "num_ln_in_parallel_attn", default=2 if is_new else 1) != 2:
            return self.parallel_layer(index)
        # In a GGUF file the norm of the feed-forward has the name that one norm for both has.
        other = self.names.before_mixer if self.is_from_gguf else "ln_mlp"
        return ParallelLayer(
            Sublayer(
                name=self.names.mixer, body=self.mixer(index), before=self.named_norm("ln_attn")
            ),
            Sublayer(
                name=self.names.feed_forward,
                body=self.feed_forward(index),
                before=self.named_norm(other),
            ),
        )

    def mixer(self, index: int) -> Mixer:
        config, bias = self.config, switch(self.config.hf, "bias")
        slopes = None
        if config.has_alibi:
            # Rounded as in training; and added before the scores are scaled.
            rounded = alibi_slopes(config.num_heads).bfloat16().float()
            slopes = rounded * config.head_dim**-0.5
        return self.attention(
            index,
            qkv_bias=bias,
            o_bias=bias,
            alibi=slopes,
            form=QkvForm(fused="query_key_value", grouped=True),
            o_name="dense",
        )

    def feed_forward(self, index: int) -> FeedForward:
        bias = switch(self.config.hf, "bias")
        return self.plain_mlp("dense_h_to_4h", "dense_4h_to_h", bias=bias)
