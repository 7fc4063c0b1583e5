"""Llama 2 and 3, and the many models with the same architecture (SmolLM2, …).

Source: Touvron et al. 2023, arXiv:2307.09288."""

from __future__ import annotations

from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.lm.architecture import Architecture


class LlamaForCausalLM(Architecture):
    """Biases where the config says so: on all four attention projections, on all of the MLP.

    Every token sees all earlier ones, even if the config mentions a sliding_window."""

    has_windows = False

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias)

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(bias=self.config.mlp_bias)
