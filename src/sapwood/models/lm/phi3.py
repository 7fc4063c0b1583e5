"""Phi-3, Phi-3.5 and Phi-4. Source: Abdin et al. 2024, arXiv:2404.14219."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.lm.architecture import Architecture


class Phi3ForCausalLM(Architecture):
    """Llama with fused projections, and a divisor for each frequency of the rotation."""

    absent: ClassVar = {"rms_norm_eps": 1e-5}

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        for name in ("rope_scaling", "rope_parameters"):
            said = found.get(name)
            if isinstance(said, Mapping) and "long_factor" in said:  # once called su, or yarn
                found[name] = {**said, "rope_type": "longrope"}
        return found

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, form=QkvForm(fused="qkv_proj"))

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(fused="gate_up_proj")
