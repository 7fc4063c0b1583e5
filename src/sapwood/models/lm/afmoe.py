"""Trinity. Source: Arcee AI 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing, Scores
from sapwood.layers.embedding import VocabEmbedding
from sapwood.layers.layer import Layer, Mixer, Sublayer
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import SLIDING, DecoderConfig, ExpertsConfig, every_nth_full
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.mixture import MixtureArchitecture


class AfmoeForCausalLM(MixtureArchitecture):
    """Gates on what attention gives; only layers with a window rotate; norms before and after both
    halves of a layer."""

    absent: ClassVar = {
        "head_dim": 128,
        "moe_intermediate_size": 1408,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "rms_norm_eps": 1e-5,
        "route_norm": True,
        "sliding_window": 1024,
    }
    router_name = "router.gate"
    correction_name = "expert_bias"
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        step = integer(found, "global_attn_every_n_layers", default=4)
        found.setdefault("layer_types", every_nth_full(integer(found, "num_hidden_layers"), step))
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        refused = {
            "experts in groups": max(hf.get("n_group") or 1, hf.get("num_expert_groups") or 1) > 1,
            f"score_func {hf.get('score_func')!r}": hf.get("score_func", "sigmoid") != "sigmoid",
        }
        for name, is_asked in refused.items():
            if is_asked:
                raise ConfigError(f"config.json asks for {name}, which is not implemented")
        return super().read(hf)

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        size = integer(hf, "moe_intermediate_size")
        return ExpertsConfig(
            num_experts=integer(hf, "num_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=size,
            shared_size=size * integer(hf, "num_shared_experts", default=2),
            dense_layers=tuple(range(integer(hf, "num_dense_layers", default=1))),
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        hf = self.config.hf
        return Routing(
            num_chosen=experts.num_per_token,
            scores=Scores.SIGMOID,
            renormalise=switch(hf, "route_norm"),
            least_sum=1e-20,
            scale=number(hf, "route_scale", default=1.0),
        )

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        if not switch(self.config.hf, "mup_enabled"):
            return super().embedding(scale=scale)
        return super().embedding(scale=scale * self.config.hidden_size**0.5)

    def rope_of(self, index: int) -> RopeConfig | None:
        return self.config.rope if self.config.hf["layer_types"][index] == SLIDING else None

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index, qkv_bias=bias, o_bias=bias, qk_norm=self.rms_norm, gate_name="gate_proj"
        )

    def layer(self, index: int) -> Layer:
        return Layer(
            Sublayer(
                name="self_attn",
                body=self.mixer(index),
                before=self.named_norm("input_layernorm"),
                after=self.named_norm("post_attention_layernorm"),
            ),
            Sublayer(
                name="mlp",
                body=self.feed_forward(index),
                before=self.named_norm("pre_mlp_layernorm"),
                after=self.named_norm("post_mlp_layernorm"),
            ),
        )
