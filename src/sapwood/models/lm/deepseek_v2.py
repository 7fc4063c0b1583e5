"""DeepSeek V2 and V3, and the models that are built alike.

Sources: DeepSeek-AI 2024, arXiv:2405.04434 and arXiv:2412.19437."""

from __future__ import annotations

from typing import ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.drafts.head import Combination
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.architecture import Architecture, one_layer_more
from sapwood.models.lm.grouped_mixture import GroupedMixture
from sapwood.models.lm.latent import InterleavedByField, LatentArchitecture


class DeepseekV2ForCausalLM(LatentArchitecture, GroupedMixture):
    """Latent attention; experts by a softmax, of which some groups are chosen first."""

    absent: ClassVar = {"moe_intermediate_size": 1407, "n_shared_experts": 2}
    correction_name = None

    def routing(self, experts: ExpertsConfig) -> Routing:
        """Renormalised weights are not scaled."""
        hf = self.config.hf
        method = hf.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(
                f"config.json asks for topk_method {method!r}; implemented for "
                f"{self.config.architecture}: greedy, group_limited_greedy"
            )
        in_groups = method == "group_limited_greedy"
        renormalise = switch(hf, "norm_topk_prob") and experts.num_per_token > 1
        return Routing(
            num_chosen=experts.num_per_token,
            renormalise=renormalise,
            least_sum=1e-20,
            scale=1.0 if renormalise else number(hf, "routed_scaling_factor", default=1.0),
            num_groups=integer(hf, "n_group") if in_groups else 1,
            num_groups_chosen=integer(hf, "topk_group") if in_groups else 1,
        )


class DeepseekV3ForCausalLM(InterleavedByField, GroupedMixture):
    """Latent attention; the layer that predicts further tokens is used for drafts alone."""

    absent: ClassVar = {
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
    }

    @property
    def ignorable(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*Architecture.ignorable, f"model.layers.{self.config.num_layers}.*")

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        return one_layer_more(config, count_field="num_nextn_predict_layers")

    def predictor(self) -> Combination:
        return self.next_layer(norm="shared_head.norm")
