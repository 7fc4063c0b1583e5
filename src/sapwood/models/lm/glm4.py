"""GLM-4-0414. Source: GLM Team 2025, its model code."""

from __future__ import annotations

from sapwood.layers.layer import Layer, Sublayer
from sapwood.models.lm.glm import GlmForCausalLM


class Glm4ForCausalLM(GlmForCausalLM):
    """GLM with norms also after attention and feed-forward."""

    can_be_rescaled = False

    def layer(self, index: int) -> Layer:
        """x + norm(attention(norm(x))), then x + norm(feed_forward(norm(x)))."""
        return Layer(
            Sublayer(
                name="self_attn",
                body=self.mixer(index),
                before=self.named_norm("input_layernorm"),
                after=self.named_norm("post_self_attn_layernorm"),
            ),
            Sublayer(
                name="mlp",
                body=self.feed_forward(index),
                before=self.named_norm("post_attention_layernorm"),
                after=self.named_norm("post_mlp_layernorm"),
            ),
        )
