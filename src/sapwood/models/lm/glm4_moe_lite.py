"""GLM-4.7-Flash. Source: its model code, Z.ai 2026."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.lm.deepseek_v2 import DeepseekV3ForCausalLM
from sapwood.models.lm.latent import dense_layers_of


class Glm4MoeLiteForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek V3 whose file says of each layer whether it has experts."""

    absent: ClassVar = {
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
    }

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        experts = super().experts_in(config)
        return replace(experts, dense_layers=dense_layers_of(config, experts.dense_layers))
