"""Gemma. Source: Gemma Team 2024, arXiv:2403.08295."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from sapwood.base.errors import ConfigError
from sapwood.layers.embedding import VocabEmbedding
from sapwood.layers.norm import Norm
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture


class GemmaForCausalLM(Architecture):
    """Norms whose weights are differences from 1, scaled embeddings, GELU in the gates."""

    absent: ClassVar = {
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if switch(hf, "use_bidirectional_attention"):
            raise ConfigError("this model's tokens attend to later ones, which is not implemented")
        return super().read(hf)

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        if found["hidden_act"] == "gelu":  # what the first files said, and did not mean
            found["hidden_act"] = "gelu_pytorch_tanh"
        return found

    def norm(self, size: int | None = None) -> Norm:
        return self.rms_norm(size, adds_one=True)

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        """Times the root of their size, which is rounded to the model's dtype."""
        root = torch.tensor(self.config.hidden_size**0.5, dtype=self.build.dtype).item()
        return super().embedding(scale=scale * root)
