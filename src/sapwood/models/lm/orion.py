"""Orion-14B. Source: Chen et al. 2024, arXiv:2401.12246."""

from __future__ import annotations

from sapwood.layers.norm import Norm
from sapwood.models.lm.llama import LlamaForCausalLM


class OrionForCausalLM(LlamaForCausalLM):
    """Llama with LayerNorms."""

    can_be_rescaled = False

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)
