"""Granite with windows and sinks, dense or with experts. Source: IBM 2026, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.experts import Fused
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import FULL, SLIDING, DecoderConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.granite import GraniteForCausalLM
from sapwood.models.lm.granite_moe_shared import GraniteMoeSharedForCausalLM


class GraniteSWAForCausalLM(GraniteForCausalLM):
    """Granite with a window in all layers but every fourth, a sink for each head, and a base of the
    rotation for each layer, of which 0 means none."""

    absent: ClassVar = {"sliding_window": 128}
    has_windows = True

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        num_layers = integer(found, "num_hidden_layers")
        return {"layer_types": [SLIDING if i % 4 else FULL for i in range(num_layers)], **found}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        return replace(super().read(hf), has_sinks=True)

    def rope_of(self, index: int) -> RopeConfig | None:
        bases, rope = self.config.hf.get("layer_rope_theta"), self.config.rope
        if bases is None or rope is None:
            return rope
        return replace(rope, theta=float(bases[index])) if bases[index] else None


class GraniteMoeSWAForCausalLM(GraniteSWAForCausalLM, GraniteMoeSharedForCausalLM):
    """The same with Granite's experts, usually without a shared one."""

    router_name = "router"
    shared_size = 0

    def files(self) -> Fused:
        return Fused(gate_up="experts.gate_up_proj", down="experts.down_proj")
