"""gpt-oss. Source: OpenAI 2025, arXiv:2508.10925."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.routing import Routing
from sapwood.layers.experts import Fused
from sapwood.layers.layer import Mixer
from sapwood.models.config import FULL, SLIDING, DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer, number
from sapwood.models.lm.mixture import MixtureArchitecture


class GptOssForCausalLM(MixtureArchitecture):
    """A window in every second layer, sinks, biases everywhere, and gates that are cut off."""

    absent: ClassVar = {"attention_bias": True, "head_dim": 64, "rms_norm_eps": 1e-5}
    router_name = "router"
    router_bias = True
    limit = 7.0

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        number_of_layers = integer(found, "num_hidden_layers")
        kinds = [FULL if layer % 2 else SLIDING for layer in range(number_of_layers)]
        return {"layer_types": kinds, **found}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        for name, value in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
            if number(hf, name, default=value) != value:
                raise ConfigError(
                    f"the model's {name} is {hf[name]!r}; only {value} is implemented"
                )
        return replace(super().read(hf), has_sinks=True)

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        return ExpertsConfig(
            num_experts=integer(config.hf, "num_local_experts"),
            num_per_token=integer(config.hf, "num_experts_per_tok"),
            intermediate_size=config.intermediate_size,
        )

    def files(self) -> Fused:
        return Fused(
            gate_up="experts.gate_up_proj",
            down="experts.down_proj",
            transposed=True,
            interleaved=True,
            biases=("experts.gate_up_proj_bias", "experts.down_proj_bias"),
        )

    def routing(self, experts: ExpertsConfig) -> Routing:
        """A softmax of the chosen logits alone."""
        return Routing(num_chosen=experts.num_per_token, renormalise=True)

    def activation(self) -> Activation:
        """x / (1 + e^(-1.702 x)), which is swiglu_alpha."""
        return Activation.QUICK_GELU

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias)
