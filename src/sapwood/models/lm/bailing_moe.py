"""Ling and Ring. Source: Ling Team 2025, arXiv:2503.05139; of version 2: arXiv:2510.22115."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing, Scores
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import Mixer
from sapwood.layers.mlp import GatedMLP
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.drafts.head import Combination
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.architecture import Architecture, Names, one_layer_more
from sapwood.models.lm.mixture import MixtureArchitecture


class BailingMoeForCausalLM(MixtureArchitecture):
    """Llama's attention with one projection to queries, keys and values; some experts are shared.
    The layer that predicts further tokens is used for drafts alone."""

    absent: ClassVar = {"norm_topk_prob": True}
    names = Names(embedding="model.word_embeddings", mixer="attention")
    has_windows = False

    @property
    def ignorable(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*Architecture.ignorable, f"model.layers.{self.config.num_layers}.*")

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if hf.get("norm_head"):
            raise ConfigError("config.json asks for norm_head, which is not implemented")
        return super().read(hf)

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        size = integer(hf, "moe_intermediate_size")
        shared = integer(hf, "moe_shared_expert_intermediate_size", default=size)
        return ExpertsConfig(
            num_experts=integer(hf, "num_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=size,
            shared_size=shared * integer(hf, "num_shared_experts", default=0),
            dense_layers=tuple(range(integer(hf, "first_k_dense_replace", default=0))),
        )

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        return one_layer_more(config, count_field="num_nextn_predict_layers")

    def predictor(self) -> Combination:
        return self.next_layer(norm="final_layernorm")

    def mixer(self, index: int) -> Mixer:
        hf = self.config.hf
        has_bias = switch(hf, "use_bias")
        return self.attention(
            index,
            qkv_bias=has_bias or switch(hf, "use_qkv_bias"),
            o_bias=has_bias,
            form=QkvForm(fused="query_key_value"),
            o_name="dense",
            qk_norm=self.rms_norm if switch(hf, "use_qk_norm") else None,
            norm_names=("query_layernorm", "key_layernorm"),
            eps=self.config.norm_eps,
        )

    def gated_mlp(self, **details: Any) -> GatedMLP:
        """Of dense layers and shared experts."""
        return super().gated_mlp(**{"bias": switch(self.config.hf, "use_bias"), **details})


class BailingMoeV2ForCausalLM(BailingMoeForCausalLM):
    """Version 2: DeepSeek V3's choice of experts, norms over each q and k head."""

    absent: ClassVar = {
        **BailingMoeForCausalLM.absent,
        "n_group": 1,
        "topk_group": 1,
        "moe_router_enable_expert_bias": True,
        "score_function": "sigmoid",
        "use_qk_norm": True,
    }

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        if (said := config.hf["score_function"]) != "sigmoid":
            raise ConfigError(
                f"the model's score_function is {said!r}; only sigmoid is implemented"
            )
        return config

    @property
    def correction_name(self) -> str | None:  # type: ignore[override]
        has_correction = switch(self.config.hf, "moe_router_enable_expert_bias")
        return "gate.expert_bias" if has_correction else None

    def routing(self, experts: ExpertsConfig) -> Routing:
        hf = self.config.hf
        return Routing(
            num_chosen=experts.num_per_token,
            scores=Scores.SIGMOID,
            renormalise=switch(hf, "norm_topk_prob") and experts.num_per_token > 1,
            least_sum=1e-20,
            scale=number(hf, "routed_scaling_factor", default=1.0),
            num_groups=integer(hf, "n_group"),
            num_groups_chosen=integer(hf, "topk_group"),
            group_best=2,
        )
