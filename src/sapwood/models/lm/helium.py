"""Helium. Source: Kyutai 2025, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.lm.architecture import Architecture


class HeliumForCausalLM(Architecture):
    """Llama with rotation of neighbouring pairs."""

    absent: ClassVar = {"head_dim": 128, "rms_norm_eps": 1e-8, "rope_theta": 100_000.0}
    has_windows = False

    def mixer(self, index: int) -> Mixer:
        pairs = self.config.rope.rotary_dim(self.config.head_dim)
        return self.attention(index, qkv_bias=self.config.attention_bias, form=QkvForm(pairs=pairs))

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(bias=self.config.mlp_bias)
