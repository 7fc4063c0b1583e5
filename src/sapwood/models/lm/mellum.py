"""Mellum 2. Source: JetBrains 2026, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import FULL, SLIDING, DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.mixture import listed_dense_layers
from sapwood.models.lm.qwen3_moe import Qwen3MoeForCausalLM


class MellumForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3's mixture with windows in the layers that config.json lists, which rotate with another
    base. The layer that predicts further tokens is not used."""

    absent: ClassVar = {
        "moe_intermediate_size": 896,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_local_experts": 64,
        "sliding_window": 1024,
    }
    ignorable = (*Architecture.ignorable, "mtp.*")

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        return {"layer_types": [FULL] * integer(found, "num_hidden_layers"), **found}

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        dense = listed_dense_layers(config.hf)
        return replace(super().experts_in(config), dense_layers=dense)

    def rope_of(self, index: int) -> RopeConfig | None:
        if self.config.hf["layer_types"][index] == SLIDING:
            return self.rope_of_windows({"rope_theta": 10_000.0})
        return self.config.rope
