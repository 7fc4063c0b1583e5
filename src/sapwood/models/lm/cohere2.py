"""Command R7B and Command A. Source: Cohere 2025, arXiv:2504.00698."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import SLIDING, every_nth_full
from sapwood.models.hf_fields import integer
from sapwood.models.lm.cohere import CohereForCausalLM


class Cohere2ForCausalLM(CohereForCausalLM):
    """Cohere with windows; the layers without a window, every fourth, rotate nothing."""

    absent: ClassVar = {**CohereForCausalLM.absent, "sliding_window": 4096, "rope_theta": 10_000.0}
    has_windows = True

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        period = integer(found, "sliding_window_pattern", default=4)
        found.setdefault("layer_types", every_nth_full(integer(hf, "num_hidden_layers"), period))
        return found

    def rope_of(self, index: int) -> RopeConfig | None:
        has_window = self.config.hf["layer_types"][index] == SLIDING
        return self.config.rope if has_window else None
