"""Apertus. Source: Swiss AI Initiative 2025, arXiv:2509.14233."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.layers.mlp import XieluMLP
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture, Names


class ApertusForCausalLM(Architecture):
    """A norm over each q and k head, and feed-forwards without gates, whose activation learns."""

    absent: ClassVar = {"rms_norm_eps": 1e-5, "rope_theta": 12_000_000.0}
    names = Names(before_mixer="attention_layernorm", before_feed_forward="feedforward_layernorm")
    ignorable = (*Architecture.ignorable, "*.act_fn.beta", "*.act_fn.eps")
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        said = found.pop("hidden_act", "xielu")
        if said != "xielu" or switch(hf, "mlp_bias"):
            raise ConfigError(
                "config.json must have xielu as 'hidden_act', and no mlp_bias; others are not "
                "implemented for Apertus"
            )
        return found

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias, qk_norm=self.rms_norm)

    def feed_forward(self, index: int) -> FeedForward:
        config = self.config
        learned = None
        if self.is_from_gguf:  # where these numbers are metadata
            learned = config.hf["xielu_alpha_p"][index], config.hf["xielu_alpha_n"][index]
        return XieluMLP(self.build, config.hidden_size, config.intermediate_size, learned=learned)
