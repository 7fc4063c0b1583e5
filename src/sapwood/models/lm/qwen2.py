"""Qwen2 and Qwen2.5. Source: Yang et al. 2024, arXiv:2407.10671.

Where the config uses a sliding window, its later layers have it (DecoderConfig)."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder, LayerRecipe


class Qwen2ForCausalLM(Decoder):
    """Biases on q, k and v, and nowhere else, whatever the config says."""

    @staticmethod
    def recipe(config: DecoderConfig) -> LayerRecipe:
        return LayerRecipe(qkv_bias=True)
