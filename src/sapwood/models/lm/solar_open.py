"""Solar Open. Source: Upstage 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.layers.layer import Mixer
from sapwood.models.hf_fields import integer
from sapwood.models.lm.grouped_mixture import GroupedMixture


class SolarOpenForCausalLM(GroupedMixture):
    """Llama's attention, DeepSeek's experts, in all layers unless the config says otherwise."""

    absent: ClassVar = {
        **GroupedMixture.absent,
        "head_dim": 128,
        "moe_intermediate_size": 1280,
        "n_shared_experts": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
    }
    has_windows = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Without dense layers there may be no size of these."""
        found = super().understood(hf)
        found.setdefault("intermediate_size", integer(found, "moe_intermediate_size"))
        return found

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, qkv_bias=self.config.attention_bias)
