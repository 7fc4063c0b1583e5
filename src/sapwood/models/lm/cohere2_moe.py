"""Command A's mixture of experts. Source: Cohere 2026, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing, Scores
from sapwood.layers.layer import FeedForward, Sublayer
from sapwood.layers.norm import Norm
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import DecoderConfig, ExpertsConfig, every_nth_full
from sapwood.models.hf_fields import integer
from sapwood.models.lm.cohere2 import Cohere2ForCausalLM
from sapwood.models.lm.mixture import MixtureArchitecture, listed_dense_layers

_IS_RMS = "norms_are_rms"
"""Whether the config.json had an epsilon of RMSNorms, and not only one of LayerNorms."""


class Cohere2MoeForCausalLM(MixtureArchitecture, Cohere2ForCausalLM):
    """Command A with experts in all but the first layers; what shared experts say is averaged with
    the others', or added."""

    absent: ClassVar = {
        **Cohere2ForCausalLM.absent,
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "prefix_dense_sliding_window_pattern": 1,
        "shared_expert_combination_strategy": "average",
    }
    spelled: ClassVar = {"rms_norm_eps": ("rms_norm_eps", "layer_norm_eps")}

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Some files say how many layers are dense, and how often such a layer has no window."""
        num_layers = integer(hf, "num_hidden_layers")
        num_dense = min(integer(hf, "first_k_dense_replace", default=0), num_layers)
        periods = (
            integer(hf, "prefix_dense_sliding_window_pattern", default=1),
            integer(hf, "sliding_window_pattern", default=4),
        )
        kinds = every_nth_full(num_dense, periods[0]) + every_nth_full(
            num_layers - num_dense, periods[1]
        )
        feed_forwards = ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense)
        said = {name: value for name, value in hf.items() if value is not None}
        found = super().understood({"layer_types": kinds, "mlp_layer_types": feed_forwards, **said})
        found[_IS_RMS] = "rms_norm_eps" in said
        for name, known in (
            ("expert_selection_fn", ("softmax", "sigmoid")),
            ("shared_expert_combination_strategy", ("average", "sum")),
        ):
            if found[name] not in known:
                raise ConfigError(
                    f"the model's {name} is {found[name]!r}; implemented are {' and '.join(known)}"
                )
        return found

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf, size = config.hf, config.intermediate_size
        return ExpertsConfig(
            num_experts=integer(hf, "num_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=size,
            shared_size=size * integer(hf, "num_shared_experts", default=0),
            dense_layers=listed_dense_layers(hf),
        )

    def norm(self, size: int | None = None) -> Norm:
        """An RMSNorm where config.json has its epsilon."""
        return self.rms_norm(size) if self.config.hf[_IS_RMS] else super().norm(size)

    def routing(self, experts: ExpertsConfig) -> Routing:
        """A softmax of the chosen logits alone, or logistic scores."""
        is_logistic = self.config.hf["expert_selection_fn"] == "sigmoid"
        return Routing(
            num_chosen=experts.num_per_token,
            scores=Scores.SIGMOID if is_logistic else Scores.SOFTMAX,
            renormalise=not is_logistic or bool(self.config.hf["norm_topk_prob"]),
        )

    def dense(self) -> FeedForward:
        size = integer(self.config.hf, "prefix_dense_intermediate_size", default=0)
        return self.gated_mlp(size=size)

    def feed_forward_sublayer(self, index: int) -> Sublayer[FeedForward]:
        sublayer, experts = super().feed_forward_sublayer(index), self.config.experts
        assert experts is not None, "read() says them"
        is_mean = self.config.hf["shared_expert_combination_strategy"] == "average"
        if index in experts.dense_layers or not experts.shared_size or not is_mean:
            return sublayer
        return replace(sublayer, scale=0.5 * sublayer.scale)

    def rope_of(self, index: int) -> RopeConfig | None:
        """Dense layers rotate also without a window, if none of them has one."""
        hf, experts = self.config.hf, self.config.experts
        assert experts is not None, "read() says them"
        if index in experts.dense_layers and hf["prefix_dense_sliding_window_pattern"] == 1:
            return self.config.rope
        return super().rope_of(index)
