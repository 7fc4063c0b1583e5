"""GLM-4-0414. Source: GLM Team 2025, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import Layer, Sublayer
from sapwood.models.lm.architecture import Architecture
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


class GlmOcrForCausalLM(Glm4ForCausalLM):
    """GLM-OCR's text part, which rotates whole heads; of its last layer, which predicts further
    tokens, nothing is used."""

    absent: ClassVar = {
        **Glm4ForCausalLM.absent,
        "attention_bias": False,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
    }

    @property
    def ignorable(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*Architecture.ignorable, f"model.layers.{self.config.num_layers}.*")
