"""OLMoE. Source: Muennighoff et al. 2024, arXiv:2409.02060."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import Mixer
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.mixture import MixtureArchitecture


class OlmoeForCausalLM(MixtureArchitecture):
    """Norms over all heads of q and of k at once, before their rotation."""

    absent: ClassVar = {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8}
    has_windows = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if hf.get("clip_qkv") is not None:
            raise ConfigError("the model asks for clip_qkv, which is not implemented")
        return super().read(hf)

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        return ExpertsConfig(
            num_experts=integer(config.hf, "num_experts"),
            num_per_token=integer(config.hf, "num_experts_per_tok"),
            intermediate_size=config.intermediate_size,
        )

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index, qkv_bias=bias, o_bias=bias, qk_norm=self.rms_norm, norms_all_heads=True
        )
