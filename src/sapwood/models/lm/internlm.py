"""InternLM 1, 2 and 3. Source: Cai et al. 2024, arXiv:2403.17297."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.lm.llama import LlamaForCausalLM


class InternLMForCausalLM(LlamaForCausalLM):
    """Llama with one field for biases of attention."""

    absent: ClassVar = {"attention_bias": True}
    spelled: ClassVar = {"attention_bias": "bias"}


class InternLM2ForCausalLM(Architecture):
    """Llama with other names, and the projections of each key and value head together."""

    absent: ClassVar = {"rope_theta": 10_000.0}
    spelled: ClassVar = {"attention_bias": "bias"}
    names = Names(
        embedding="model.tok_embeddings",
        head="output",
        mixer="attention",
        feed_forward="feed_forward",
        before_mixer="attention_norm",
        before_feed_forward="ffn_norm",
    )
    ignorable_when_tied = ("output.weight",)
    has_windows = False
    can_be_rescaled = False

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index,
            qkv_bias=bias,
            o_bias=bias,
            form=QkvForm(fused="wqkv", grouped=True),
            o_name="wo",
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(names=("w1", "w3", "w2"))


class InternLM3ForCausalLM(Architecture):
    """Llama with one field for biases of q, k and v, and one for all other layers."""

    has_windows = False

    def mixer(self, index: int) -> Mixer:
        hf = self.config.hf
        return self.attention(index, qkv_bias=switch(hf, "qkv_bias"), o_bias=switch(hf, "bias"))

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(bias=switch(self.config.hf, "bias"))
