"""DeepSeek's first mixture of experts. Source: Dai et al. 2024, arXiv:2401.06066."""

from __future__ import annotations

from typing import ClassVar

from sapwood.kernels.routing import Routing
from sapwood.layers.layer import Mixer
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.mixture import MixtureArchitecture


class DeepseekForCausalLM(MixtureArchitecture):
    """Llama's attention; many small experts, of which some are shared, after dense layers."""

    absent: ClassVar = {"num_experts_per_tok": 6, "moe_intermediate_size": 1407}
    has_windows = False

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        size = integer(hf, "moe_intermediate_size")
        first = integer(hf, "first_k_dense_replace", default=0)
        step = max(1, integer(hf, "moe_layer_freq", default=1))
        layers = range(config.num_layers)
        return ExpertsConfig(
            num_experts=integer(hf, "n_routed_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=size,
            shared_size=size * integer(hf, "n_shared_experts", default=0),
            dense_layers=tuple(layer for layer in layers if layer < first or layer % step),
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        """The weight of a token's only expert is its score."""
        renormalise = switch(self.config.hf, "norm_topk_prob") and experts.num_per_token > 1
        return Routing(num_chosen=experts.num_per_token, renormalise=renormalise, least_sum=1e-20)

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias)
