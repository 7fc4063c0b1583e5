"""OLMo. Source: Groeneveld et al. 2024, arXiv:2402.00838."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.layers.layer import Mixer
from sapwood.layers.norm import Norm
from sapwood.models.hf_fields import optional_number
from sapwood.models.lm.architecture import Architecture


class OlmoForCausalLM(Architecture):
    """Llama with LayerNorms that have no weights; projections may be cut."""

    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().understood(hf), "rms_norm_eps": 1e-5}

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size, is_learned=False)

    def mixer(self, index: int) -> Mixer:
        bias, clip = self.config.attention_bias, optional_number(self.config.hf, "clip_qkv")
        return self.attention(index, qkv_bias=bias, o_bias=bias, clip=clip)
