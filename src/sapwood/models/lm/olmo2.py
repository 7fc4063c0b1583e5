"""OLMo 2. Source: OLMo Team 2024, arXiv:2501.00656."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import Layer, Mixer, Sublayer
from sapwood.models.lm.architecture import Architecture


class Olmo2ForCausalLM(Architecture):
    """Norms after attention and feed-forward only, and over all heads of q and of k at once."""

    absent: ClassVar = {"rms_norm_eps": 1e-5}
    has_windows = False
    can_be_rescaled = False

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index, qkv_bias=bias, o_bias=bias, qk_norm=self.rms_norm, norms_all_heads=True
        )

    def layer(self, index: int) -> Layer:
        """x + norm(attention(x)), then x + norm(feed_forward(x))."""
        return Layer(
            Sublayer(
                name="self_attn",
                body=self.mixer(index),
                after=self.named_norm("post_attention_layernorm"),
            ),
            Sublayer(
                name="mlp",
                body=self.feed_forward(index),
                after=self.named_norm("post_feedforward_layernorm"),
            ),
        )
