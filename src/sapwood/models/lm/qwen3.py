"""Qwen3. Source: Yang et al. 2025, arXiv:2505.09388.

Where the config uses a sliding window, its later layers have it (DecoderConfig)."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder, LayerRecipe


class Qwen3ForCausalLM(Decoder):
    """A norm over each q and k head; attention biases where the config says so."""

    @staticmethod
    def recipe(config: DecoderConfig) -> LayerRecipe:
        return LayerRecipe(
            qkv_bias=config.attention_bias, o_bias=config.attention_bias, qk_norm=True
        )
