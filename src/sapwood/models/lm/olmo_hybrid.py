"""OLMo Hybrid: gated delta nets in most layers, OLMo 3's attention in the others.

Source: OLMo Team 2026, its model code; Yang et al. 2024, arXiv:2412.06464."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.delta import DeltaLayout, DeltaNames, DeltaProjections
from sapwood.layers.layer import Layer, Mixer, Sublayer
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import FULL
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.delta import DeltaArchitecture, every_nth_attends

NO_ROPE = "no_rope"
"""The field of the config that `understood` adds: whether nothing rotates."""


class OlmoHybridForCausalLM(DeltaArchitecture):
    """Norms come before the halves of a linear layer, and after those of the others."""

    absent: ClassVar = {
        "linear_allow_neg_eigval": True,
        "max_position_embeddings": 65_536,
        "rms_norm_eps": 1e-6,
    }
    projections = DeltaProjections(
        names=("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
    )
    delta_names = DeltaNames(conv=("q_conv1d", "k_conv1d", "v_conv1d"), norm="o_norm")
    delta_out = "o_proj"
    delta_eps = 1e-5
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        number = integer(found, "num_hidden_layers")
        kinds = every_nth_attends(number, 4)
        if FULL not in kinds:
            kinds[-1] = FULL
        heads = integer(found, "num_attention_heads")
        key_heads = integer(found, "linear_num_key_heads", default=heads)
        key_dim = int(0.75 * integer(found, "hidden_size") / max(key_heads, 1))
        key_dim = integer(found, "linear_key_head_dim", default=key_dim)
        said = found.get("rope_parameters") or {}
        rotates = said.get("rope_theta", found.get("rope_theta")) is not None
        return {
            "layer_types": kinds,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": key_dim,
            "linear_value_head_dim": 2 * key_dim,
            NO_ROPE: not rotates,
            **found,
            **({} if rotates else {"rope_parameters": None, "rope_theta": 10_000.0}),
        }

    @classmethod
    def layout(cls, hf: Mapping[str, Any]) -> DeltaLayout:
        scale = 2.0 if switch(hf, "linear_allow_neg_eigval") else 1.0
        return replace(super().layout(hf), write_scale=scale)

    def rope_of(self, index: int) -> RopeConfig | None:
        return None if switch(self.config.hf, NO_ROPE) else self.config.rope

    def full_attention(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index, qkv_bias=bias, o_bias=bias, qk_norm=self.rms_norm, norms_all_heads=True
        )

    def layer(self, index: int) -> Layer:
        if self.is_linear(index):
            return Layer(
                Sublayer(
                    name="linear_attn",
                    body=self.mixer(index),
                    before=self.named_norm("attention_layer_norm"),
                ),
                Sublayer(
                    name="mlp",
                    body=self.feed_forward(index),
                    before=self.named_norm("feedforward_layer_norm"),
                ),
            )
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
