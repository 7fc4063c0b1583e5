"""EXAONE 3 and 3.5. Source: LG AI Research 2024, arXiv:2408.03541."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.lm.architecture import Architecture, Names


class ExaoneForCausalLM(Architecture):
    """Llama with other names."""

    absent: ClassVar = {"rms_norm_eps": 1e-5}
    spelled: ClassVar = {
        "hidden_act": "activation_function",
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    names = Names(
        embedding="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        mixer="attn.attention",
        before_mixer="ln_1",
        before_feed_forward="ln_2",
    )
    ignorable = ("*.rotary.inv_freq", "*.rotary_emb.inv_freq")
    has_windows = False
    can_be_rescaled = False

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, o_name="out_proj")

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(names=("c_fc_0", "c_fc_1", "c_proj"))
