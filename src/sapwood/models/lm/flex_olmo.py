"""FlexOlmo. Source: Shi et al. 2025, arXiv:2507.07024."""

from __future__ import annotations

from typing import ClassVar

from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.mixture import MixtureArchitecture
from sapwood.models.lm.olmo2 import Olmo2ForCausalLM


class FlexOlmoForCausalLM(MixtureArchitecture, Olmo2ForCausalLM):
    """OLMo 2 with experts."""

    absent: ClassVar = {"rms_norm_eps": 1e-6, "num_experts": 7, "num_experts_per_tok": 5}

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        return ExpertsConfig(
            num_experts=integer(config.hf, "num_experts"),
            num_per_token=integer(config.hf, "num_experts_per_tok"),
            intermediate_size=config.intermediate_size,
        )
