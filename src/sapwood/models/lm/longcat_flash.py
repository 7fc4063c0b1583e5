"""LongCat-Flash. Source: Meituan LongCat Team 2025, arXiv:2509.01322."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing
from sapwood.layers.latent_attention import LatentAttention
from sapwood.layers.layer import FeedForward, Layer, Mixer, ShortcutLayer, Sublayer
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.drafts.head import Combination, projection
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.latent import LatentArchitecture
from sapwood.models.lm.mixture import MixtureArchitecture

PREDICTOR = "model.mtp.layers.0"


class LongcatFlashForCausalLM(LatentArchitecture, MixtureArchitecture):
    """A layer has two attentions and two dense feed-forwards; a mixture takes what the first
    feed-forward takes, and its result is added at the layer's end. Some experts leave a token as it
    is. The layer that predicts further tokens, which is dense, is used for drafts alone."""

    spelled: ClassVar = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "moe_intermediate_size": "expert_ffn_hidden_size",
        "num_experts_per_tok": "moe_topk",
    }
    absent: ClassVar = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True}
    router_name = "router.classifier"
    correction_name = "router.e_score_correction_bias"

    @property
    def ignorable(self) -> tuple[str, ...]:  # type: ignore[override]
        """Experts that leave a token as it is may have weights all the same."""
        experts = self.config.experts
        assert experts is not None, "read() says them"
        others = range(experts.num_experts, experts.num_experts + experts.num_identity)
        unused = (f"model.layers.*.mlp.experts.{expert}.*" for expert in others)
        return (*LatentArchitecture.ignorable, "model.mtp.*", *unused)

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        if switch(config.hf, "router_bias") or hf.get("zero_expert_type", "identity") != "identity":
            raise ConfigError(
                "config.json asks for router_bias, or for a zero_expert_type other than identity, "
                "which are not implemented for LongCat-Flash"
            )
        dense = 3 * config.hidden_size * config.intermediate_size
        return replace(
            config,
            attentions_per_layer=2,
            other_parameters=2 * config.num_layers * dense,
        )

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        return ExpertsConfig(
            num_experts=integer(hf, "n_routed_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=integer(hf, "moe_intermediate_size"),
            num_identity=integer(hf, "zero_expert_num", default=0),
        )

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        """The predictor has one attention and one feed-forward, so here each attention of the model
        counts as a layer. Files that do not say how many predictors there are have one."""
        hf, experts, num_layers = config.hf, config.experts, config.num_layers
        assert experts is not None, "read() says them"
        if integer(hf, "num_nextn_predict_layers", default=1) < 1:
            return None
        if switch(hf, "nextn_use_scmoe"):
            raise ConfigError(
                "config.json asks for nextn_use_scmoe, experts in the layer that predicts further "
                "tokens, which is not implemented"
            )
        dense = 3 * config.hidden_size * config.intermediate_size
        dense_layers = tuple(range(num_layers, 2 * num_layers + 1))
        return replace(
            config,
            num_layers=2 * num_layers + 1,
            attentions_per_layer=1,
            experts=replace(experts, dense_layers=dense_layers),
            other_parameters=config.other_parameters - num_layers * dense,
        )

    def predictor(self) -> Combination:
        size = self.config.hidden_size
        mixer: Sublayer[Mixer] = Sublayer(
            name="self_attn",
            body=self.latent_attention(self.config.num_layers - 1),
            before=self.named_norm("input_layernorm"),
        )
        feed_forward: Sublayer[FeedForward] = Sublayer(
            name="transformer_layer.mlp",
            body=self.dense(),
            before=self.named_norm("post_attention_layernorm"),
        )
        return Combination(
            projection=projection(self.build, f"{PREDICTOR}.eh_proj", 2 * size, size, bias=False),
            embedding_norm=self.named_norm(f"{PREDICTOR}.enorm.m"),
            state_norm=self.named_norm(f"{PREDICTOR}.hnorm.m"),
            layers={PREDICTOR: Layer(mixer, feed_forward)},
            norm=self.named_norm("model.mtp.norm"),
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        scale = number(self.config.hf, "routed_scaling_factor", default=1.0)
        return Routing(num_chosen=experts.num_per_token, scale=scale)

    def layer(self, index: int) -> Layer:
        experts = self.config.experts
        assert experts is not None, "read() says them"
        return ShortcutLayer(
            [self._mixer_sublayer(index, at) for at in range(2)],
            [self._dense_sublayer(at) for at in range(2)],
            ("mlp", self.mixture(experts)),
        )

    def _mixer_sublayer(self, index: int, at: int) -> Sublayer[Mixer]:
        before = self.named_norm(f"input_layernorm.{at}")
        body = self.latent_attention(2 * index + at)
        return Sublayer(name=f"self_attn.{at}", body=body, before=before)

    def _dense_sublayer(self, at: int) -> Sublayer[FeedForward]:
        before = self.named_norm(f"post_attention_layernorm.{at}")
        return Sublayer(name=f"mlps.{at}", body=self.dense(), before=before)

    def latent_attention(self, index: int, **details: Any) -> LatentAttention:
        """index: of the attention, two of which are in each layer"""
        hf, sizes, hidden_size = self.config.hf, self.latent_sizes, self.config.hidden_size
        scale, latent_scale = sizes.key_dim**-0.5 * self.sharpness, 1.0
        if sizes.query_rank is not None and switch(hf, "mla_scale_q_lora"):
            scale *= (hidden_size / sizes.query_rank) ** 0.5
        if switch(hf, "mla_scale_kv_lora"):
            latent_scale = (hidden_size / sizes.rank) ** 0.5
        scales = {"scale": scale, "latent_scale": latent_scale}
        return super().latent_attention(index, **{**scales, **details})
