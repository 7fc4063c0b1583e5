"""MiniCPM 3. Source: OpenBMB 2024, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.models.hf_fields import integer
from sapwood.models.lm.latent import LatentArchitecture
from sapwood.models.lm.minicpm import MiniCPMForCausalLM


class MiniCPM3ForCausalLM(LatentArchitecture, MiniCPMForCausalLM):
    """MiniCPM's factors, latent attention with rotated halves."""

    absent: ClassVar = {
        "tie_word_embeddings": True,
        "dim_model_base": 256,
        "scale_depth": 1.4,
        "scale_emb": 12,
    }
    rotates_pairs = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        hidden_size = integer(found, "hidden_size")
        value_dim = hidden_size // max(1, integer(found, "num_attention_heads"))
        return {"v_head_dim": value_dim, **found}
