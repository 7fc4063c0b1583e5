"""StarCoder and SantaCoder. Source: Li et al. 2023, arXiv:2305.06161."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import Mixer
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import switch
from sapwood.models.lm.gpt2 import GPT2LMHeadModel


class GPTBigCodeForCausalLM(GPT2LMHeadModel):
    """GPT-2 with weights [out, in]; all query heads share one key and value head, if the config
    does not say otherwise."""

    absent: ClassVar = {
        **GPT2LMHeadModel.absent,
        "hidden_act": "gelu_pytorch_tanh",
        "multi_query": True,
    }
    is_transposed = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        return replace(config, num_kv_heads=1) if switch(config.hf, "multi_query") else config

    def mixer(self, index: int) -> Mixer:
        hf = self.config.hf
        return self.attention(
            index,
            qkv_bias=True,
            o_bias=True,
            scale=self.config.head_dim**-0.5 if switch(hf, "scale_attn_weights") else 1.0,
            form=QkvForm(fused="c_attn", grouped=not switch(hf, "multi_query")),
            o_name="c_proj",
        )
