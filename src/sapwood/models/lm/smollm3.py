"""SmolLM3. Source of layers without rotation: Yang et al. 2025, arXiv:2501.18795."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import Mixer
from sapwood.layers.rotary import unrotated
from sapwood.models.config import FULL, SLIDING
from sapwood.models.hf_fields import integer
from sapwood.models.lm.llama import LlamaForCausalLM


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """Llama with layers that do not rotate; windows, where the config uses them, in these only."""

    absent: ClassVar = {
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    has_windows = True

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        num_layers = integer(hf, "num_hidden_layers")
        interval = max(1, integer(found, "no_rope_layer_interval"))
        rotates = found.setdefault(
            "no_rope_layers", [int((index + 1) % interval != 0) for index in range(num_layers)]
        )
        if not isinstance(rotates, list) or len(rotates) < num_layers:
            raise ConfigError(
                f"config.json must have a 0 or 1 for each of its {num_layers} layers in "
                f"'no_rope_layers', got {rotates!r}"
            )
        found.setdefault("layer_types", [FULL if one else SLIDING for one in rotates[:num_layers]])
        return found

    def mixer(self, index: int) -> Mixer:
        bias, config = self.config.attention_bias, self.config
        table = self.cos_sin(config.rope)
        if not config.hf["no_rope_layers"][index]:
            table = unrotated(config.context_length, self.build.device)
        return self.attention(index, qkv_bias=bias, o_bias=bias, cos_sin=table)
