"""Qwen1.5's and Qwen2's mixtures of experts. Source: Yang et al. 2024, arXiv:2407.10671."""

from __future__ import annotations

from typing import ClassVar

from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.mixture import MixtureArchitecture, dense_layers
from sapwood.models.lm.qwen2 import Qwen2ForCausalLM


class Qwen2MoeForCausalLM(MixtureArchitecture, Qwen2ForCausalLM):
    """Qwen2's attention; a shared expert has a weight of its own for each token."""

    absent: ClassVar = {
        **Qwen2ForCausalLM.absent,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": 5632,
    }
    shared_name = "shared_expert"
    shared_gate = "shared_expert_gate"

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        return ExpertsConfig(
            num_experts=integer(config.hf, "num_experts"),
            num_per_token=integer(config.hf, "num_experts_per_tok"),
            intermediate_size=integer(config.hf, "moe_intermediate_size"),
            shared_size=integer(config.hf, "shared_expert_intermediate_size"),
            dense_layers=dense_layers(config.hf, config.num_layers),
        )
