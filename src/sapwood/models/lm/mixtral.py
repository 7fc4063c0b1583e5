"""Mixtral, Mistral's mixture of experts. Source: Jiang et al. 2024, arXiv:2401.04088."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sapwood.kernels.activations import Activation
from sapwood.layers.experts import Experts
from sapwood.layers.layer import FeedForward
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Architecture, Names


class MixtralForCausalLM(Architecture):
    """Mistral's attention; the weights of a token's experts add up to 1."""

    names = Names(feed_forward="block_sparse_moe")

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        experts = ExpertsConfig(
            num_experts=integer(hf, "num_local_experts", default=8),
            num_per_token=integer(hf, "num_experts_per_tok", default=2),
            intermediate_size=config.intermediate_size,
        )
        return replace(config, experts=experts)

    def feed_forward(self, index: int) -> FeedForward:
        config, experts = self.config, self.config.experts
        assert experts is not None, "read() says them"
        return Experts(
            self.build,
            config.hidden_size,
            experts.intermediate_size,
            num_experts=experts.num_experts,
            num_per_token=experts.num_per_token,
            renormalise=True,
            activation=Activation(config.activation),
            router="gate",
            names=("w1", "w3", "w2"),
        )
