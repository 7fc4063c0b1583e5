"""LFM2 with experts (LFM2-8B-A1B). Source: Liquid AI 2025, arXiv:2511.23404."""

from __future__ import annotations

from typing import ClassVar

from sapwood.kernels.routing import Routing, Scores
from sapwood.layers.experts import PerExpert
from sapwood.layers.layer import FeedForward
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.lfm2 import Lfm2ForCausalLM
from sapwood.models.lm.mixture import MixtureArchitecture


class Lfm2MoeForCausalLM(MixtureArchitecture, Lfm2ForCausalLM):
    """LFM2's mixers; logistic scores of experts, in all but the first layers."""

    absent: ClassVar = {
        **Lfm2ForCausalLM.absent,
        "block_auto_adjust_ff_dim": False,
        "moe_intermediate_size": 1792,
        "norm_topk_prob": True,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "use_expert_bias": True,
    }

    @property
    def correction_name(self) -> str | None:  # type: ignore[override]
        return "expert_bias" if switch(self.config.hf, "use_expert_bias") else None

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        return ExpertsConfig(
            num_experts=integer(hf, "num_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=integer(hf, "moe_intermediate_size"),
            dense_layers=tuple(range(integer(hf, "num_dense_layers", default=2))),
        )

    def files(self) -> PerExpert:
        return PerExpert(gate="w1", up="w3", down="w2")

    def dense(self) -> FeedForward:
        return Lfm2ForCausalLM.feed_forward(self, 0)

    def routing(self, experts: ExpertsConfig) -> Routing:
        """Liquid's code adds 1e-6 to the sum of the chosen scores. The sum is far larger than that,
        so a least sum of 1e-6 gives the same weights but for rounding."""
        hf = self.config.hf
        return Routing(
            num_chosen=experts.num_per_token,
            scores=Scores.SIGMOID,
            renormalise=switch(hf, "norm_topk_prob"),
            least_sum=1e-6,
            scale=number(hf, "routed_scaling_factor", default=1.0),
        )
