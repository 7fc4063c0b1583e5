"""StarCoder2. Source: Lozhkov et al. 2024, arXiv:2402.19173."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.kernels.activations import Activation
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.norm import Norm
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture


class Starcoder2ForCausalLM(Architecture):
    """LayerNorms, feed-forwards without gates, and biases everywhere or nowhere."""

    absent: ClassVar = {
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": True,
    }
    spelled: ClassVar = {"rms_norm_eps": "norm_epsilon"}
    can_be_rescaled = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        return replace(super().read(hf), is_gated=False)

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        bias = switch(self.config.hf, "use_bias")
        return self.attention(index, qkv_bias=bias, o_bias=bias)

    def feed_forward(self, index: int) -> FeedForward:
        return PlainMLP(
            self.build,
            self.config.hidden_size,
            self.config.intermediate_size,
            activation=Activation(self.config.activation),
            bias=switch(self.config.hf, "use_bias"),
            names=("c_fc", "c_proj"),
        )
