"""MiniCPM 1 and 4. Source: Hu et al. 2024, arXiv:2404.06395."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import integer, number
from sapwood.models.lm.llama import LlamaForCausalLM


class MiniCPMForCausalLM(LlamaForCausalLM):
    """Llama with factors of embeddings, of what layers add, and of logits."""

    absent: ClassVar = {"dim_model_base": 1, "scale_depth": 1.0, "scale_emb": 1.0}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if hf.get("num_experts") or hf.get("sparse_config"):
            raise ConfigError(
                "config.json asks for num_experts or sparse_config, which are not implemented for "
                "MiniCPM"
            )
        return super().read(hf)

    def __init__(self, config: DecoderConfig, build: Build) -> None:
        super().__init__(config, build)
        self.residual_scale = number(config.hf, "scale_depth") / config.num_layers**0.5

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        return super().embedding(scale=scale * number(self.config.hf, "scale_emb"))

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        factor = integer(self.config.hf, "dim_model_base") / self.config.hidden_size
        return super().head(tied, scale=factor, **details)
