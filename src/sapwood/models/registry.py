"""Which class builds an architecture, by the name that config.json gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sapwood.base.registry import Registry

if TYPE_CHECKING:
    from sapwood.models.lm.decoder import Decoder

ARCHITECTURES: Registry[type[Decoder]] = Registry(
    "architecture",
    {
        "LlamaForCausalLM": "sapwood.models.lm.llama:LlamaForCausalLM",
        "MistralForCausalLM": "sapwood.models.lm.mistral:MistralForCausalLM",
        "Qwen2ForCausalLM": "sapwood.models.lm.qwen2:Qwen2ForCausalLM",
        "Qwen3ForCausalLM": "sapwood.models.lm.qwen3:Qwen3ForCausalLM",
    },
    entry_point="sapwood.architectures",
)
