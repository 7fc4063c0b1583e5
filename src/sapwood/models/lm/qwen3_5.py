"""Qwen3.5: Qwen3-Next's layers, with or without experts. Of models that also see, the text part.

Source: Qwen Team 2026, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.delta import DeltaProjections
from sapwood.models.lm.qwen3_next import GatedQwen, GatedQwenMixture


class Qwen3_5ForCausalLM(GatedQwen):  # noqa: N801 as config.json spells it
    """Dense; projections of gated delta nets lie in a layer for each purpose."""

    projections = DeltaProjections(
        names=("q", "k", "v", "in_proj_z", "in_proj_b", "in_proj_a"), qkv="in_proj_qkv"
    )


class Qwen3_5MoeForCausalLM(GatedQwenMixture, Qwen3_5ForCausalLM):  # noqa: N801 as there
    """All layers have experts."""

    absent: ClassVar = {
        **GatedQwen.absent,
        "intermediate_size": 1,  # no layer is dense
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "shared_expert_intermediate_size": 512,
    }
