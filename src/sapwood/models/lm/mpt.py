"""MPT. Source: MosaicML 2023, its model code."""

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
from sapwood.models.hf_fields import integer, number, optional_number, switch
from sapwood.models.lm.architecture import Architecture, Names


class MptForCausalLM(Architecture):
    """ALiBi instead of rotation, LayerNorms without bias, no gates; projections may be cut."""

    absent: ClassVar = {
        "hidden_act": "gelu",
        "no_bias": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    spelled: ClassVar = {
        "hidden_act": (),
        "hidden_size": "d_model",
        "intermediate_size": (),
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": (),
        "rms_norm_eps": "layer_norm_epsilon",
    }
    names = Names(
        embedding="transformer.wte",
        layers="transformer.blocks",
        norm="transformer.norm_f",
        mixer="attn",
        feed_forward="ffn",
        before_mixer="norm_1",
        before_feed_forward="norm_2",
    )
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        ratio = integer(found, "expansion_ratio", default=4)
        found["intermediate_size"] = ratio * integer(found, "hidden_size")
        said = found.get("attn_config") or {}
        if not isinstance(said, Mapping):
            raise ConfigError(f"config.json must have an object as 'attn_config', got {said!r}")
        return {**found, "attn_config": {"alibi": True, **said}}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        attention = config.hf["attn_config"]
        refused = {
            "no_bias false": not switch(config.hf, "no_bias"),
            "attn_config.alibi false": not switch(attention, "alibi"),
            "attn_config.prefix_lm": switch(attention, "prefix_lm"),
            "attn_config.qk_ln": switch(attention, "qk_ln"),
            "multiquery_attention": attention.get("attn_type") == "multiquery_attention",
            "logit_scale": config.hf.get("logit_scale") is not None,
        }
        for name, is_asked in refused.items():
            if is_asked:
                raise ConfigError(f"config.json asks for {name}, which is not implemented")
        return replace(config, has_alibi=True)

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size, bias=False)

    def rope_of(self, index: int) -> RopeConfig | None:
        return None

    def mixer(self, index: int) -> Mixer:
        config, said = self.config, self.config.hf["attn_config"]
        max_bias = number(said, "alibi_bias_max", default=8)
        return self.attention(
            index,
            alibi=alibi_slopes(config.num_heads, max_bias=max_bias),
            clip=optional_number(said, "clip_qkv"),
            scale=optional_number(said, "softmax_scale"),
            form=QkvForm(fused="Wqkv"),
            o_name="out_proj",
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("up_proj", "down_proj", bias=False)
