"""Qwen3-Next: gated delta nets, gated attention in every fourth layer, and a mixture of experts.

Source: Qwen Team 2025, its model code; Yang et al. 2024, arXiv:2412.06464."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.delta import DeltaProjections
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import Mixer
from sapwood.layers.norm import Norm
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.drafts.head import Combination
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.delta import DeltaArchitecture, every_nth_attends
from sapwood.models.lm.mixture import MixtureArchitecture, dense_layers

SPLITS_QKVZ = "gguf_splits_qkvz"
"""A field that only files have which were made of GGUF files (store/gguf_config)."""


class GatedQwen(DeltaArchitecture):
    """Attention whose layer of queries has gates too; norms have their weights' differences from 1;
    a quarter of each head rotates. The layer that predicts further tokens, which has attention, is
    used for drafts alone."""

    absent: ClassVar = {
        "head_dim": 256,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "partial_rotary_factor": 0.25,
    }
    ignorable = (*Architecture.ignorable, "mtp.*")
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        step = integer(found, "full_attention_interval", default=4)
        kinds = every_nth_attends(integer(found, "num_hidden_layers"), step)
        return {"layer_types": kinds, **found}

    @classmethod
    def with_predictor(cls, config: DecoderConfig) -> DecoderConfig | None:
        """Files that do not say how many such layers there are have one."""
        if integer(config.hf, "mtp_num_hidden_layers", default=1) < 1:
            return None
        return replace(config, num_layers=config.num_layers + 1)

    def predictor(self) -> Combination:
        return self.mtp_layer()

    def norm(self, size: int | None = None) -> Norm:
        return self.rms_norm(size, adds_one=True)

    def full_attention(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=lambda size: self.rms_norm(size, adds_one=True),
            form=QkvForm(gated=True),
        )


class GatedQwenMixture(MixtureArchitecture):
    """Qwen's experts, of which one that every token has is weighed by a gate."""

    shared_name = "shared_expert"
    shared_gate = "shared_expert_gate"

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf = config.hf
        return ExpertsConfig(
            num_experts=integer(hf, "num_experts"),
            num_per_token=integer(hf, "num_experts_per_tok"),
            intermediate_size=integer(hf, "moe_intermediate_size"),
            shared_size=integer(hf, "shared_expert_intermediate_size"),
            dense_layers=dense_layers(hf, config.num_layers),
        )


class Qwen3NextForCausalLM(GatedQwen, GatedQwenMixture):
    """Projections of gated delta nets lie in two layers, key head by key head. In GGUF files the
    first one is two: one for queries, keys and values, and one for gates of the output."""

    absent: ClassVar = {
        **GatedQwen.absent,
        "intermediate_size": 5632,
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "shared_expert_intermediate_size": 512,
    }
    projections = DeltaProjections(
        names=("q", "k", "v", "in_proj_z", "b", "a"),
        grouped_inputs="in_proj_qkvz",
        grouped_gates="in_proj_ba",
    )

    def delta_projections(self) -> DeltaProjections:
        if not self.config.hf.get(SPLITS_QKVZ, False):
            return self.projections
        return replace(self.projections, grouped_inputs=None, qkv="in_proj_qkv")
