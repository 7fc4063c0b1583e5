"""Baichuan 1 and 2. Source: Yang et al. 2023, arXiv:2309.10305."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.heads import QkvForm, alibi_slopes
from sapwood.layers.layer import Mixer
from sapwood.layers.rope_config import RopeConfig
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.architecture import Architecture

BAICHUAN2_VOCAB = 125_696
"""Tokens of Baichuan 2, whose output layer has rows of length 1; config.json does not say so."""


class BaichuanForCausalLM(Architecture):
    """Llama with fused projections. The models of 13 billion parameters, whose config.json has no
    max_position_embeddings, have ALiBi instead of rotation."""

    absent: ClassVar = {"model_max_length": 4096}
    has_windows = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        return {"max_position_embeddings": found["model_max_length"], **found}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        return replace(super().read(hf), has_alibi=hf.get("max_position_embeddings") is None)

    def rope_of(self, index: int) -> RopeConfig | None:
        return None if self.config.has_alibi else self.config.rope

    def mixer(self, index: int) -> Mixer:
        config = self.config
        slopes = alibi_slopes(config.num_heads) if config.has_alibi else None
        return self.attention(index, alibi=slopes, form=QkvForm(fused="W_pack"))

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        normalises = self.config.vocab_size == BAICHUAN2_VOCAB
        return super().head(tied, normalises=normalises, **details)
