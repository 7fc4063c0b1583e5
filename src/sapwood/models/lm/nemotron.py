"""Nemotron-4 and Minitron. Source: Parmar et al. 2024, arXiv:2402.16819."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.norm import Norm
from sapwood.models.lm.architecture import Architecture


class NemotronForCausalLM(Architecture):
    """LayerNorms whose weights are differences from 1, squared ReLU without gates, and rotation of
    half of each head."""

    absent: ClassVar = {
        "hidden_act": "relu2",
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
    }
    spelled: ClassVar = {
        "partial_rotary_factor": ("partial_rotary_factor", "rope_percent", "rope_percentage"),
        "rms_norm_eps": "norm_eps",
    }
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size, adds_one=True)

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias)

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("up_proj", "down_proj", bias=self.config.mlp_bias)
