"""StarCoder2. Source: Lozhkov et al. 2024, arXiv:2402.19173."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.norm import Norm
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
    has_gates = False
    can_be_rescaled = False

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        bias = switch(self.config.hf, "use_bias")
        return self.attention(index, qkv_bias=bias, o_bias=bias)

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("c_fc", "c_proj", bias=switch(self.config.hf, "use_bias"))
