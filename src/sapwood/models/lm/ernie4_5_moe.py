"""ERNIE 4.5 with experts. Source: Baidu 2025, ERNIE 4.5 technical report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from sapwood.kernels.routing import Routing
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.mlp import GatedMLP
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.drafts.head import Combination, projection
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.architecture import Architecture, one_layer_more
from sapwood.models.lm.ernie4_5 import Ernie4_5ForCausalLM
from sapwood.models.lm.mixture import MixtureArchitecture


class Ernie4_5_MoeForCausalLM(MixtureArchitecture, Ernie4_5ForCausalLM):  # noqa: N801 as there
    """ERNIE 4.5's attention; a softmax over all experts, and a correction bias for their choice.
    The layer that predicts further tokens, which is dense, is used for drafts alone."""

    absent: ClassVar = {
        **{name: value for name, value in Ernie4_5ForCausalLM.absent.items() if name != "head_dim"},
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
    }
    spelled: ClassVar = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
    ignorable = (*Architecture.ignorable, "model.mtp_*")
    correction_name = "moe_statics.e_score_correction_bias"
    correction_is_row = True

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        size = integer(hf, "moe_intermediate_size")
        first = integer(hf, "moe_layer_start_index", default=1)
        last = integer(hf, "moe_layer_end_index", default=-1)
        step = max(1, integer(hf, "moe_layer_interval", default=1))
        last = config.num_layers - 1 if last == -1 else last
        layers = range(config.num_layers)
        with_experts = [
            index for index in layers if first <= index <= last and not (index + 1) % step
        ]
        return ExpertsConfig(
            num_experts=integer(hf, "num_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=size,
            shared_size=size * integer(hf, "moe_num_shared_experts", default=2),
            dense_layers=tuple(index for index in layers if index not in with_experts),
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        return Routing(
            num_chosen=experts.num_per_token,
            renormalise=True,
            least_sum=number(self.config.hf, "moe_norm_min", default=1e-12),
        )

    def gated_mlp(self, **details: Any) -> GatedMLP:
        """Of dense layers and shared experts."""
        return super().gated_mlp(**{"bias": switch(self.config.hf, "use_bias"), **details})

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        return super().head(tied, bias=switch(self.config.hf, "use_bias"), **details)

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        found = one_layer_more(config, count_field="num_nextn_predict_layers")
        if found is None or found.experts is None:
            return found
        dense = (*found.experts.dense_layers, config.num_layers)
        return replace(found, experts=replace(found.experts, dense_layers=dense))

    def predictor(self) -> Combination:
        size, has_bias = self.config.hidden_size, switch(self.config.hf, "use_bias")
        return Combination(
            projection=projection(
                self.build, "model.mtp_linear_proj.0", 2 * size, size, bias=has_bias
            ),
            embedding_norm=self.named_norm("model.mtp_emb_norm.0"),
            state_norm=self.named_norm("model.mtp_hidden_norm.0"),
            drops_first=True,
            layers={"model.mtp_block.0": self.layer(self.config.num_layers - 1)},
        )
