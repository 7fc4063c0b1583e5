"""MiniMax-M2. Source: MiniMax 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.kernels.routing import Routing, Scores
from sapwood.layers.layer import Mixer
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.mixtral import MixtralForCausalLM


class MiniMaxM2ForCausalLM(MixtralForCausalLM):
    """Norms over all heads of q and of k at once, rotation of a part of each head, and logistic
    scores of experts."""

    absent: ClassVar = {
        "head_dim": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "rope_theta": 5_000_000.0,
    }
    has_windows = False
    correction_name = "e_score_correction_bias"

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The first files say how many entries of a head rotate."""
        found = super().understood(hf)
        if "rotary_dim" in found:
            rotary_dim, head_dim = integer(found, "rotary_dim"), integer(found, "head_dim")
            found.setdefault("partial_rotary_factor", rotary_dim / max(1, head_dim))
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if not all(hf.get("attn_type_list") or ()):
            raise ConfigError("config.json asks for linear attention, which is not implemented")
        return super().read(hf)

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, qk_norm=self.rms_norm, norms_all_heads=True)

    def routing(self, experts: ExpertsConfig) -> Routing:
        return Routing(num_chosen=experts.num_per_token, scores=Scores.SIGMOID, renormalise=True)
