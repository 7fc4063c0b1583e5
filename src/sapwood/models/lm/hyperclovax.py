"""HyperCLOVA X. Source: NAVER Cloud 2025, its model code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.layer import FeedForward, Mixer, Sublayer
from sapwood.models.hf_fields import number, switch
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.granite import GraniteForCausalLM


class HyperCLOVAXForCausalLM(GraniteForCausalLM):
    """Granite whose attention and feed-forward may have a norm after them, too, and whose logits
    are multiplied where Granite's are divided."""

    absent: ClassVar = {"use_post_norm": True}

    def mixer(self, index: int) -> Mixer:
        config = self.config
        scale = number(config.hf, "attention_multiplier", default=config.head_dim**-0.5)
        bias = config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias, scale=scale)

    def mixer_sublayer(self, index: int) -> Sublayer[Mixer]:
        sublayer = super().mixer_sublayer(index)
        return (
            replace(sublayer, after=self.named_norm("post_norm1")) if self._has_more else sublayer
        )

    def feed_forward_sublayer(self, index: int) -> Sublayer[FeedForward]:
        sublayer = super().feed_forward_sublayer(index)
        return (
            replace(sublayer, after=self.named_norm("post_norm2")) if self._has_more else sublayer
        )

    @property
    def _has_more(self) -> bool:
        return switch(self.config.hf, "use_post_norm")

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        return Architecture.head(self, tied, scale=self._multiplier("logits_scaling"), **details)
