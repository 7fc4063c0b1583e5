"""Phi-3.5-MoE. Source: Liu et al. 2024, arXiv:2409.12136; Abdin et al. 2024, arXiv:2404.14219."""

from __future__ import annotations

from typing import Any, ClassVar

from sapwood.kernels.routing import Routing, Scores
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.layer import Mixer
from sapwood.layers.norm import Norm
from sapwood.models.config import ExpertsConfig
from sapwood.models.hf_fields import number, switch
from sapwood.models.lm.mixtral import MixtralForCausalLM


class PhimoeForCausalLM(MixtralForCausalLM):
    """Mixtral with LayerNorms, longrope, and two experts that are chosen one after the other."""

    absent: ClassVar = {"num_local_experts": 16, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0}
    can_be_rescaled = False

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(index, qkv_bias=bias, o_bias=bias)

    def routing(self, experts: ExpertsConfig) -> Routing:
        return Routing(
            num_chosen=experts.num_per_token,
            scores=Scores.SPARSEMIXER,
            jitter=number(self.config.hf, "router_jitter_noise", default=0.01),
        )

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        return super().head(tied, bias=switch(self.config.hf, "lm_head_bias"), **details)
