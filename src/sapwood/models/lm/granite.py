"""Granite 3. Source of its multipliers: Yang et al. 2022, arXiv:2203.03466."""

from __future__ import annotations

from typing import Any

from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import number
from sapwood.models.lm.architecture import Architecture


class GraniteForCausalLM(Architecture):
    """Llama with four multipliers."""

    has_windows = False

    def __init__(self, config: DecoderConfig, build: Build) -> None:
        super().__init__(config, build)
        self.residual_scale = self._multiplier("residual_multiplier")

    def mixer(self, index: int) -> Mixer:
        bias, scale = self.config.attention_bias, self._multiplier("attention_multiplier")
        return self.attention(index, qkv_bias=bias, o_bias=bias, scale=scale)

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(bias=self.config.mlp_bias)

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        return super().embedding(scale=scale * self._multiplier("embedding_multiplier"))

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        return super().head(tied, scale=1 / self._multiplier("logits_scaling"), **details)

    def _multiplier(self, name: str) -> float:
        return number(self.config.hf, name, default=1.0)
