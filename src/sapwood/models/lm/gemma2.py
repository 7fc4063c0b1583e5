"""Gemma 2. Source: Gemma Team 2024, arXiv:2408.00118."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.layer import Layer, Mixer, Sublayer
from sapwood.models.config import FULL, SLIDING, DecoderConfig
from sapwood.models.hf_fields import integer, number, optional_number
from sapwood.models.lm.gemma import GemmaForCausalLM


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Gemma with norms also after attention and feed-forward, windows in every second layer, and
    soft caps of scores and logits."""

    absent: ClassVar = {**GemmaForCausalLM.absent, "query_pre_attn_scalar": 256}
    spelled: ClassVar = {"hidden_act": "hidden_activation"}
    has_windows = True

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        # Here null means that there is none, and only what is absent has another meaning.
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        found = super().understood(hf)
        found |= {name: hf.get(name, cap) for name, cap in caps.items()}
        found["sliding_window"] = hf.get("sliding_window", 4096)
        num_layers = integer(hf, "num_hidden_layers")
        alternating = [FULL if index % 2 else SLIDING for index in range(num_layers)]
        return {"layer_types": alternating, **found}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        return replace(config, soft_cap=optional_number(config.hf, "attn_logit_softcapping"))

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, scale=number(self.config.hf, "query_pre_attn_scalar") ** -0.5)

    def layer(self, index: int) -> Layer:
        """x + norm(attention(norm(x))), then x + norm(feed_forward(norm(x)))."""
        return Layer(
            Sublayer(
                name="self_attn",
                body=self.mixer(index),
                before=self.named_norm("input_layernorm"),
                after=self.named_norm("post_attention_layernorm"),
            ),
            Sublayer(
                name="mlp",
                body=self.feed_forward(index),
                before=self.named_norm("pre_feedforward_layernorm"),
                after=self.named_norm("post_feedforward_layernorm"),
            ),
        )

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        soft_cap = optional_number(self.config.hf, "final_logit_softcapping")
        return super().head(tied, soft_cap=soft_cap, **details)
