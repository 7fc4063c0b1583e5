"""OLMo 3. Source: OLMo Team 2025, arXiv:2512.13961."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import SLIDING, every_nth_full
from sapwood.models.hf_fields import integer
from sapwood.models.lm.olmo2 import Olmo2ForCausalLM


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """OLMo 2 with windows in three of four layers, whose rotation is not scaled."""

    absent: ClassVar = {
        **Olmo2ForCausalLM.absent,
        "rope_theta": 500_000.0,
        "sliding_window": 4096,
    }
    has_windows = True

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        found.setdefault("layer_types", every_nth_full(integer(hf, "num_hidden_layers"), 4))
        return found

    def rope_of(self, index: int) -> RopeConfig | None:
        if self.config.hf["layer_types"][index] != SLIDING:
            return self.config.rope
        return self.rope_of_windows({"rope_theta": self.config.rope.theta})
