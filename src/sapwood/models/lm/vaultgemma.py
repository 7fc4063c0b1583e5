"""VaultGemma. Source: Sinha et al. 2025, arXiv:2510.15001."""

from __future__ import annotations

from sapwood.layers.layer import Layer
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.lm.gemma2 import Gemma2ForCausalLM


class VaultGemmaForCausalLM(Gemma2ForCausalLM):
    """Gemma 2 with norms before attention and feed-forward alone."""

    names = Names(before_feed_forward="pre_feedforward_layernorm")

    def layer(self, index: int) -> Layer:
        return Architecture.layer(self, index)
