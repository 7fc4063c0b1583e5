"""GLM-4-9B in its newer files. Source: GLM Team 2024, arXiv:2406.12793."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.lm.architecture import Architecture


class GlmForCausalLM(Architecture):
    """Llama with rotation of neighbouring pairs in half of each head, and a fused feed-forward."""

    absent: ClassVar = {
        "attention_bias": True,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-07,
    }
    has_windows = False

    def mixer(self, index: int) -> Mixer:
        pairs = self.config.rope.rotary_dim(self.config.head_dim)
        return self.attention(index, qkv_bias=self.config.attention_bias, form=QkvForm(pairs=pairs))

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(fused="gate_up_proj")
