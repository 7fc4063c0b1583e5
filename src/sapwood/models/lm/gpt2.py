"""GPT-2. Source: Radford et al. 2019."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.embedding import LearnedPositions
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.norm import Norm
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Architecture, Names


class GPT2LMHeadModel(Architecture):
    """Learned positions, LayerNorms, no gates, biases everywhere, and weights [in, out]."""

    absent: ClassVar = {
        "hidden_act": "gelu_new",
        "rms_norm_eps": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    }
    spelled: ClassVar = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": (),
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    names = Names(
        embedding="transformer.wte",
        positions="transformer.wpe",
        layers="transformer.h",
        norm="transformer.ln_f",
        mixer="attn",
        before_mixer="ln_1",
        before_feed_forward="ln_2",
    )
    ignorable = ("*.attn.bias", "*.attn.masked_bias")
    lacks_prefix = "transformer."
    has_gates = False
    has_windows = False
    can_be_rescaled = False
    is_transposed: ClassVar[bool] = True
    """Whether weights are [in, out]."""

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        found.setdefault("intermediate_size", 4 * integer(found, "hidden_size"))
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if switch(hf, "add_cross_attention"):
            raise ConfigError("config.json asks for add_cross_attention, which is not implemented")
        return super().read(hf)

    def positions(self) -> LearnedPositions:
        config = self.config
        length = config.rope.trained_length
        return LearnedPositions(self.build, length, config.hidden_size, offset=0)

    def rope_of(self, index: int) -> RopeConfig | None:
        return None

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        hf = self.config.hf
        scale = self.config.head_dim**-0.5 if switch(hf, "scale_attn_weights") else 1.0
        if switch(hf, "scale_attn_by_inverse_layer_idx"):
            scale /= index + 1
        return self.attention(
            index,
            qkv_bias=True,
            o_bias=True,
            scale=scale,
            form=QkvForm(fused="c_attn", transposed=self.is_transposed),
            o_name="c_proj",
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("c_fc", "c_proj", bias=True, transposed=self.is_transposed)
