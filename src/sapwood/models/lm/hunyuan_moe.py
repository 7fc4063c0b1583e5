"""Hunyuan with experts (Hunyuan-A13B). Source: Tencent 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.hunyuan import HunYuanDenseV1ForCausalLM
from sapwood.models.lm.mixture import MixtureArchitecture

_LISTED = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")
"""Fields that may have a number for each layer."""


class HunYuanMoEV1ForCausalLM(MixtureArchitecture, HunYuanDenseV1ForCausalLM):
    """Hunyuan's attention; a softmax over all experts, and one that every token has."""

    spelled: ClassVar = {"moe_topk": ("moe_topk", "num_experts_per_tok")}
    router_name = "gate.wg"
    shared_name = "shared_mlp"

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        for name in _LISTED:
            if isinstance(value := found.get(name), list):
                if len(set(map(str, value))) != 1:
                    raise ConfigError(
                        f"config.json has different {name} for its layers, which is not implemented"
                    )
                found[name] = value[0]
        for name in ("use_cla", "moe_layer_num_skipped"):
            if found.get(name):
                raise ConfigError(f"config.json asks for {name}, which is not implemented")
        return found

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        hf, size = config.hf, config.intermediate_size
        return ExpertsConfig(
            num_experts=integer(hf, "num_experts"),
            num_per_token=integer(hf, "moe_topk", default=1),
            intermediate_size=integer(hf, "moe_intermediate_size", default=size),
            shared_size=size * integer(hf, "num_shared_expert", default=1),
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        return Routing(num_chosen=experts.num_per_token, renormalise=True)
