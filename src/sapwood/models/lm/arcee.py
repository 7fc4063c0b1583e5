"""AFM. Source: Arcee AI 2025, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import FeedForward
from sapwood.models.lm.llama import LlamaForCausalLM


class ArceeForCausalLM(LlamaForCausalLM):
    """Llama with squared ReLU instead of gates."""

    absent: ClassVar = {"hidden_act": "relu2", "rms_norm_eps": 1e-5}
    has_gates = False
    can_be_rescaled = False

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("up_proj", "down_proj", bias=self.config.mlp_bias)
