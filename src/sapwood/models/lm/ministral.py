"""Ministral 8B and Ministral 3. Source: Liu et al. 2026, arXiv:2601.08584."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapwood.layers.layer import Mixer
from sapwood.models.config import SLIDING
from sapwood.models.hf_fields import integer, number
from sapwood.models.lm.mistral import MistralForCausalLM


class MinistralForCausalLM(MistralForCausalLM):
    """Mistral, where layer_types says which layers have the window: by default all."""

    absent: ClassVar = {"sliding_window": 4096}

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        found.setdefault("layer_types", [SLIDING] * integer(hf, "num_hidden_layers"))
        return found


class Ministral3ForCausalLM(MistralForCausalLM):
    """Mistral, where queries grow with their positions beyond the length of the training."""

    absent: ClassVar = {"head_dim": 128, "rms_norm_eps": 1e-5}

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, query_scale=self._query_scale())

    def _query_scale(self) -> Tensor | None:
        """[positions] fp32: 1 + beta * log(1 + (position // trained length)); None: 1 everywhere"""
        hf = self.config.hf
        said = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        trained = integer(
            said,
            "original_max_position_embeddings",
            default=self.config.rope.trained_length,
        )
        length = self.config.context_length
        if not said.get("llama_4_scaling_beta") or length <= trained:
            return None
        times = torch.arange(length, device=self.build.device) // trained
        return 1 + number(said, "llama_4_scaling_beta") * torch.log1p(times.float())
