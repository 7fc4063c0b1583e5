"""Llama 2 and 3, and the many models with the same architecture (SmolLM2, …).

Source: Touvron et al. 2023, arXiv:2307.09288."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder, LayerRecipe


class LlamaForCausalLM(Decoder):
    """Biases where the config says so: on all four attention projections, on all of the MLP."""

    @staticmethod
    def recipe(config: DecoderConfig) -> LayerRecipe:
        return LayerRecipe(
            qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias
        )
