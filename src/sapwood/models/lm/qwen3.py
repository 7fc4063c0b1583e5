"""Qwen3. Source: Yang et al. 2025, arXiv:2505.09388."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import Mixer
from sapwood.models.lm.architecture import Architecture


class Qwen3ForCausalLM(Architecture):
    """A norm over each q and k head; attention biases where the config says so."""

    absent: ClassVar = {"head_dim": 128, "use_sliding_window": False, "max_window_layers": 28}

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        return self.attention(
            index,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=self.rms_norm,
        )
