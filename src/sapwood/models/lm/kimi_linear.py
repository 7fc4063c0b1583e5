"""Kimi Linear: Kimi delta attention in most layers, latent attention that rotates nothing in the
others, and a mixture of experts. Source: Kimi Team 2025, arXiv:2510.26692."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.delta import DeltaLayout, KimiDeltaAttention
from sapwood.layers.experts import PerExpert
from sapwood.layers.layer import FeedForward, Mixer, Sublayer
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import FULL, DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.delta import LINEAR, checked, with_states
from sapwood.models.lm.grouped_mixture import GroupedMixture
from sapwood.models.lm.latent import LatentArchitecture, dense_layers_of


class KimiLinearForCausalLM(LatentArchitecture, GroupedMixture):
    """Experts are DeepSeek V3's, in layers of another name than the dense ones."""

    absent: ClassVar = {
        **GroupedMixture.absent,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 1_048_576,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.446,
    }
    spelled: ClassVar = {
        "max_position_embeddings": ("model_max_length", "max_position_embeddings"),
        "n_group": ("num_expert_group", "n_group"),
        "n_routed_experts": ("num_experts", "num_local_experts"),
        "n_shared_experts": ("num_shared_experts", "n_shared_experts"),
        "norm_topk_prob": ("moe_renormalize", "norm_topk_prob"),
        "num_experts_per_tok": ("num_experts_per_token", "num_experts_per_tok"),
    }

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        said = found.get("linear_attn_config") or {}
        if not isinstance(said, Mapping):
            raise ConfigError(f"config.json must have an object 'linear_attn_config', got {said!r}")
        for ours, theirs in (
            ("linear_num_heads", "num_heads"),
            ("linear_head_dim", "head_dim"),
            ("linear_conv_kernel_dim", "short_conv_kernel_size"),
        ):
            if said.get(theirs) is not None:
                found[ours] = said[theirs]
        found.setdefault("layer_types", _kinds(integer(found, "num_hidden_layers"), said))
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        return with_states(super().read(hf), _layout(cls.understood(hf)))

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        found = super().experts_in(config)
        return replace(found, dense_layers=dense_layers_of(config, found.dense_layers))

    def files(self) -> PerExpert:
        return PerExpert(gate="w1", up="w3", down="w2")

    def rope_of(self, index: int) -> RopeConfig | None:
        return None

    def mixer(self, index: int) -> Mixer:
        config = self.config
        if index not in config.layers_with_states:
            return self.latent_attention(index)
        return KimiDeltaAttention(
            self.build, index, config.hidden_size, _layout(config.hf), eps=config.norm_eps
        )

    def feed_forward_sublayer(self, index: int) -> Sublayer[FeedForward]:
        sublayer = super().feed_forward_sublayer(index)
        experts = self.config.experts
        is_dense = experts is None or index in experts.dense_layers
        return sublayer if is_dense else replace(sublayer, name="block_sparse_moe")


def _kinds(num_layers: int, said: Mapping[str, Any]) -> list[str]:
    """layer_types as linear_attn_config says them, which counts layers from 1; else every fourth
    layer after the first has attention."""
    attending = said.get("full_attn_layers")
    if attending is None:
        return [FULL if index and index % 4 == 0 else LINEAR for index in range(num_layers)]
    if not isinstance(attending, list) or not set(range(1, num_layers + 1)).issuperset(attending):
        raise ConfigError(
            f"config.json must have numbers of its {num_layers} layers in "
            f"linear_attn_config.full_attn_layers, got {attending!r}"
        )
    return [FULL if index + 1 in attending else LINEAR for index in range(num_layers)]


def _layout(hf: Mapping[str, Any]) -> DeltaLayout:
    heads = integer(hf, "linear_num_heads", default=32)
    size = integer(hf, "linear_head_dim", default=128)
    return checked(
        DeltaLayout(
            num_key_heads=heads,
            num_heads=heads,
            key_dim=size,
            value_dim=size,
            length=integer(hf, "linear_conv_kernel_dim", default=4),
            per_channel=True,
        )
    )
