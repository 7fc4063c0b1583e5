"""Granite 3's mixture of experts."""

from __future__ import annotations

from typing import ClassVar

from sapwood.kernels.routing import Routing
from sapwood.layers.experts import Fused
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Names
from sapwood.models.lm.granite import GraniteForCausalLM
from sapwood.models.lm.mixture import MixtureArchitecture


class GraniteMoeForCausalLM(MixtureArchitecture, GraniteForCausalLM):
    """Granite with experts, which lie in one tensor each for inputs and outputs."""

    names = Names(feed_forward="block_sparse_moe")
    router_name = "router.layer"
    files: ClassVar = Fused(gate_up="input_linear.weight", down="output_linear.weight")

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        return ExpertsConfig(
            num_experts=integer(config.hf, "num_local_experts", default=8),
            num_per_token=integer(config.hf, "num_experts_per_tok", default=2),
            intermediate_size=config.intermediate_size,
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        """A softmax of the chosen logits alone."""
        return Routing(num_chosen=experts.num_per_token, renormalise=True)
