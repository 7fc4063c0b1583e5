"""K-EXAONE. Source: LG AI Research 2026, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import Layer
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.exaone4 import Exaone4ForCausalLM
from sapwood.models.lm.grouped_mixture import GroupedMixture


class ExaoneMoeForCausalLM(GroupedMixture, Exaone4ForCausalLM):
    """EXAONE 4's attention between norms as Llama has them; DeepSeek's experts. The layer that
    predicts further tokens is not used."""

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
