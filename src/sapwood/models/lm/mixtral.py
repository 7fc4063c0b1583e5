"""Mixtral, Mistral's mixture of experts. Source: Jiang et al. 2024, arXiv:2401.04088."""

from __future__ import annotations

from typing import ClassVar

from sapwood.kernels.routing import Routing
from sapwood.layers.experts import PerExpert
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Names
from sapwood.models.lm.mixture import MixtureArchitecture


class MixtralForCausalLM(MixtureArchitecture):
    """Mistral's attention; the weights of a token's experts add up to 1."""

    names = Names(feed_forward="block_sparse_moe")
    files: ClassVar = PerExpert(gate="w1", up="w3", down="w2")

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        return ExpertsConfig(
            num_experts=integer(config.hf, "num_local_experts", default=8),
            num_per_token=integer(config.hf, "num_experts_per_tok", default=2),
            intermediate_size=config.intermediate_size,
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        return Routing(num_chosen=experts.num_per_token, renormalise=True)
