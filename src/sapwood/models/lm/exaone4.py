"""EXAONE 4. Source: LG AI Research 2025, arXiv:2507.11407."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import Layer, Mixer, Sublayer
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import FULL, SLIDING, every_nth_full
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Architecture


class Exaone4ForCausalLM(Architecture):
    """Norms after attention and feed-forward only, and over each q and k head. Where some layers
    have a window, the others rotate nothing."""

    absent: ClassVar = {"rms_norm_eps": 1e-5}
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        num_layers = integer(hf, "num_hidden_layers")
        if "sliding_window" not in found:
            return {**found, "layer_types": [FULL] * num_layers}
        pattern = found.get("sliding_window_pattern", 4)
        if isinstance(pattern, str):
            kinds = {"L": SLIDING, "G": FULL}
            if not pattern or not kinds.keys() >= set(pattern):
                raise ConfigError(
                    "config.json must have a number, or letters L (window) and G (all) as "
                    f"'sliding_window_pattern', got {pattern!r}"
                )
            own = [kinds[pattern[index % len(pattern)]] for index in range(num_layers)]
            own[-1] = FULL
        else:
            own = every_nth_full(num_layers, integer(found, "sliding_window_pattern", default=4))
        found.setdefault("layer_types", own)
        return found

    def rope_of(self, index: int) -> RopeConfig | None:
        is_hybrid = self.config.sliding_window is not None
        is_full = self.config.hf["layer_types"][index] == FULL
        return None if is_hybrid and is_full else self.config.rope

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, qk_norm=self.rms_norm)

    def layer(self, index: int) -> Layer:
        """x + norm(attention(x)), then x + norm(feed_forward(x))."""
        return Layer(
            Sublayer(
                name="self_attn",
                body=self.mixer(index),
                after=self.named_norm("post_attention_layernorm"),
            ),
            Sublayer(
                name="mlp",
                body=self.feed_forward(index),
                after=self.named_norm("post_feedforward_layernorm"),
            ),
        )
