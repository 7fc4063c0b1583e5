"""GPT-NeoX and Pythia. Source: Black et al. 2022, arXiv:2204.06745."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Layer, Mixer
from sapwood.layers.norm import Norm
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture, Names


class GPTNeoXForCausalLM(Architecture):
    """LayerNorms, no gates, rotation of a quarter of each head; attention and feed-forward beside
    each other, each with its norm."""

    absent: ClassVar = {
        "attention_bias": True,
        "hidden_act": "gelu",
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-5,
        "use_parallel_residual": True,
    }
    spelled: ClassVar = {
        "num_key_value_heads": (),
        "rms_norm_eps": "layer_norm_eps",
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
        "rope_theta": ("rope_theta", "rotary_emb_base"),
    }
    names = Names(
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        head="embed_out",
        mixer="attention",
    )
    ignorable = (
        "*.attention.bias",
        "*.attention.masked_bias",
        "*.attention.rotary_emb.inv_freq",
        "*.rotary_emb.inv_freq",
    )
    ignorable_when_tied = ("embed_out.weight",)
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        return name.replace("lm_head.", "embed_out.")  # how newer files call it

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def layer(self, index: int) -> Layer:
        if switch(self.config.hf, "use_parallel_residual"):
            return self.parallel_layer(index, shares_norm=False)
        return super().layer(index)

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index,
            qkv_bias=bias,
            o_bias=bias,
            form=QkvForm(fused="query_key_value", grouped=True),
            o_name="dense",
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("dense_h_to_4h", "dense_4h_to_h", bias=True)
