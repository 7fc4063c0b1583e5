"""K-EXAONE. Source: LG AI Research 2026, its model code."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from sapwood.layers.layer import Layer
from sapwood.models.config import DecoderConfig
from sapwood.models.drafts.head import Combination
from sapwood.models.lm.architecture import Architecture, one_layer_more
from sapwood.models.lm.exaone4 import Exaone4ForCausalLM
from sapwood.models.lm.grouped_mixture import GroupedMixture


class ExaoneMoeForCausalLM(GroupedMixture, Exaone4ForCausalLM):
    """EXAONE 4's attention between norms as Llama has them; DeepSeek's experts. The layer that
    predicts further tokens, of the first one's kind, is used for drafts alone."""

    absent: ClassVar = {
        **GroupedMixture.absent,
        **Exaone4ForCausalLM.absent,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1024,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
    }
    spelled: ClassVar = {
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
    }
    ignorable = (*Architecture.ignorable, "mtp.*")
    correction_name = "e_score_correction_bias"

    def layer(self, index: int) -> Layer:
        return Architecture.layer(self, index)

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        found = one_layer_more(config, count_field="num_nextn_predict_layers")
        if found is None or found.experts is None:
            return found
        index, experts, kinds = config.num_layers, found.experts, config.hf["layer_types"]
        if 0 in experts.dense_layers:
            experts = replace(experts, dense_layers=(*experts.dense_layers, index))
        windowed = config.windowed_layers
        return replace(
            found,
            experts=experts,
            windowed_layers=(*windowed, index) if 0 in windowed else windowed,
            hf={**config.hf, "layer_types": [*kinds[:index], kinds[0]]},
        )

    def predictor(self) -> Combination:
        return self.mtp_layer()
