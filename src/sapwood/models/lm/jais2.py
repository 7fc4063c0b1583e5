"""Jais 2. Source: Inception AI 2025, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.norm import Norm
from sapwood.models.lm.nemotron import NemotronForCausalLM


class Jais2ForCausalLM(NemotronForCausalLM):
    """Nemotron with ordinary LayerNorms, biases, and rotation of whole heads."""

    absent: ClassVar = {
        "attention_bias": True,
        "hidden_act": "relu2",
        "mlp_bias": True,
        "rms_norm_eps": 1e-5,
    }
    spelled: ClassVar = {"rms_norm_eps": "layer_norm_eps"}

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)
