"""Mistral 7B and its successors. Source: Jiang et al. 2023, arXiv:2310.06825.

Where the config has a sliding window, all layers have it (DecoderConfig)."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder, LayerRecipe


class MistralForCausalLM(Decoder):
    """No biases, whatever the config says."""

    @staticmethod
    def recipe(config: DecoderConfig) -> LayerRecipe:
        return LayerRecipe()
