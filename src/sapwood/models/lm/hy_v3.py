"""Hunyuan 3. Source: Tencent 2026, its model code."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.grouped_mixture import GroupedMixture
from sapwood.models.lm.mixture import listed_dense_layers


class HYV3ForCausalLM(GroupedMixture):
    """A norm over each q and k head, and DeepSeek's experts without groups. Layers that predict
    further tokens are not used."""

    absent: ClassVar = {
        **GroupedMixture.absent,
        "head_dim": 128,
        "n_shared_experts": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 11_158_840.0,
        "routed_scaling_factor": 2.826,
    }
    spelled: ClassVar = {
        "n_routed_experts": ("num_experts", "num_local_experts"),
        "n_shared_experts": "num_shared_experts",
        "routed_scaling_factor": "router_scaling_factor",
    }
    has_windows = False
    correction_name = "expert_bias"
    router_name = "router.gate"
    shared_name = "shared_mlp"

    @property
    def ignorable(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*Architecture.ignorable, f"model.layers.{self.config.num_layers}.*")

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        """The first layer is dense where config.json lists none."""
        dense = listed_dense_layers(config.hf, otherwise=(0,))
        return replace(super().experts_in(config), dense_layers=dense)

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias, qk_norm=self.rms_norm)

    def dense(self) -> FeedForward:
        return self.gated_mlp(bias=self.config.mlp_bias)
