"""Persimmon. Source: Adept 2023, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.norm import HeadNormForm, Norm
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture, Names


class PersimmonForCausalLM(Architecture):
    """LayerNorms, also of each q and k head, squared ReLU without gates, biases, and rotation of
    half of each head."""

    absent: ClassVar = {
        "hidden_act": "relu2",
        "partial_rotary_factor": 0.5,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-5,
    }
    spelled: ClassVar = {"num_key_value_heads": (), "rms_norm_eps": "layer_norm_eps"}
    names = Names(norm="model.final_layernorm")
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        norms = HeadNormForm(bias=True, is_shared=True)
        return self.attention(
            index,
            qkv_bias=True,
            o_bias=True,
            form=QkvForm(fused="query_key_value", grouped=True),
            o_name="dense",
            head_norm=norms if switch(self.config.hf, "qk_layernorm") else None,
            norm_names=("q_layernorm", "k_layernorm"),
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("dense_h_to_4h", "dense_4h_to_h", bias=True)
