"""Seed-OSS. Source: ByteDance Seed 2025, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import Mixer
from sapwood.models.hf_fields import switch
from sapwood.models.lm.llama import LlamaForCausalLM


class SeedOssForCausalLM(LlamaForCausalLM):
    """Llama with one field for biases on q, k and v, and one for that after attention."""

    absent: ClassVar = {"attention_bias": True, "head_dim": 128}

    def mixer(self, index: int) -> Mixer:
        o_bias = switch(self.config.hf, "attention_out_bias")
        return self.attention(index, qkv_bias=self.config.attention_bias, o_bias=o_bias)
