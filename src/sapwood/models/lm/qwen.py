"""Qwen 1. Source: Bai et al. 2023, arXiv:2309.16609."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Architecture, Names


class QWenLMHeadModel(Architecture):
    """Qwen 2 with other names and fused projections. Served contexts are within the length of the
    training, so that there is no scaling with the length."""

    absent: ClassVar = {"rms_norm_eps": 1e-6}
    spelled: ClassVar = {
        "head_dim": "kv_channels",
        "max_position_embeddings": ("seq_length", "max_position_embeddings"),
        "num_key_value_heads": (),
        "rms_norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
    }
    names = Names(
        embedding="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        mixer="attn",
        before_mixer="ln_1",
        before_feed_forward="ln_2",
    )
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        # The field counts gate and up together.
        return {**found, "intermediate_size": integer(found, "intermediate_size") // 2}

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, qkv_bias=True, form=QkvForm(fused="c_attn"), o_name="c_proj")

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(names=("w2", "w1", "c_proj"))
