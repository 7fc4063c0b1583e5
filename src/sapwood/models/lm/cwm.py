"""Code World Model. Source: FAIR CodeGen Team 2025, arXiv:2510.02387."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.models.config import FULL, SLIDING
from sapwood.models.hf_fields import integer
from sapwood.models.lm.llama import LlamaForCausalLM


class CwmForCausalLM(LlamaForCausalLM):
    """Llama with a window in three of four layers."""

    absent: ClassVar = {
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": 8192,
    }
    has_windows = True

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        num_layers = integer(hf, "num_hidden_layers")
        kinds = [SLIDING if index % 4 else FULL for index in range(num_layers)]
        found.setdefault("layer_types", kinds)
        return found
