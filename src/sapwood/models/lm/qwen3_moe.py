"""Qwen3's mixture of experts. Source: Yang et al. 2025, arXiv:2505.09388."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.mixture import MixtureArchitecture, dense_layers
from sapwood.models.lm.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(MixtureArchitecture, Qwen3ForCausalLM):
    """Qwen3's attention; no expert is shared."""

    absent: ClassVar = {
        "use_sliding_window": False,
        "max_window_layers": 0,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    }

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Newer files call the number of experts num_local_experts."""
        found = super().understood(hf)
        return {"num_experts": found.get("num_local_experts", 128), **found}

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        return ExpertsConfig(
            num_experts=integer(config.hf, "num_experts"),
            num_per_token=integer(config.hf, "num_experts_per_tok"),
            intermediate_size=integer(config.hf, "moe_intermediate_size"),
            dense_layers=dense_layers(config.hf, config.num_layers),
        )
