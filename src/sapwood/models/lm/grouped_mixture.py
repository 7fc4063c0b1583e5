"""DeepSeek V3's experts, which other families have too: in groups, some of them shared.

Source: DeepSeek-AI 2024, arXiv:2412.19437."""

from __future__ import annotations

from typing import ClassVar

from sapwood.kernels.routing import Routing, Scores
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, number
from sapwood.models.lm.mixture import MixtureArchitecture


class GroupedMixture(MixtureArchitecture):
    """The first layers are dense; a correction bias keeps experts equally busy."""

    absent: ClassVar = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    correction_name: ClassVar[str | None] = "gate.e_score_correction_bias"

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        size = integer(hf, "moe_intermediate_size")
        return ExpertsConfig(
            num_experts=integer(hf, "n_routed_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=size,
            shared_size=size * integer(hf, "n_shared_experts", default=0),
            dense_layers=tuple(range(integer(hf, "first_k_dense_replace", default=0))),
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        hf = self.config.hf
        return Routing(
            num_chosen=experts.num_per_token,
            scores=Scores.SIGMOID,
            renormalise=bool(hf.get("norm_topk_prob")),
            least_sum=1e-20,
            scale=number(hf, "routed_scaling_factor", default=1.0),
            num_groups=integer(hf, "n_group"),
            num_groups_chosen=integer(hf, "topk_group"),
            group_best=2,
        )
