"""Qwen2 and Qwen2.5. Source: Yang et al. 2024, arXiv:2407.10671."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import Mixer
from sapwood.models.lm.architecture import Architecture


class Qwen2ForCausalLM(Architecture):
    """Biases on q, k and v, and nowhere else, whatever the config says."""

    absent: ClassVar = {"use_sliding_window": False, "max_window_layers": 28}

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, qkv_bias=True)
