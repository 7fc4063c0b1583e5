"""Phi-1, Phi-1.5 and Phi-2. Source: Li et al. 2023, arXiv:2309.05463."""

from __future__ import annotations

from typing import Any, ClassVar

from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.layer import FeedForward, Layer, Mixer
from sapwood.layers.norm import HeadNormForm, Norm
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture, Names


class PhiForCausalLM(Architecture):
    """LayerNorms, attention and a feed-forward without a gate beside each other, biases
    everywhere, and rotation of half of each head."""

    absent: ClassVar = {
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
    }
    spelled: ClassVar = {"rms_norm_eps": "layer_norm_eps"}
    names = Names(norm="model.final_layernorm")
    has_windows = False
    has_gates = False
    can_be_rescaled = False

    def layer(self, index: int) -> Layer:
        return self.parallel_layer(index)

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        norms = HeadNormForm(bias=True, is_shared=True)
        return self.attention(
            index,
            qkv_bias=True,
            o_bias=True,
            o_name="dense",
            head_norm=norms if switch(self.config.hf, "qk_layernorm") else None,
            norm_names=("q_layernorm", "k_layernorm"),
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("fc1", "fc2", bias=True)

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        return super().head(tied, bias=True, **details)
