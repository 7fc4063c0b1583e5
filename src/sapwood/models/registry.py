"""Which class builds an architecture, by the name that config.json gives it. No torch until one is
asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from sapwood.base.errors import ConfigError
from sapwood.base.registry import Registry
from sapwood.models.config import DecoderConfig, architecture_of
from sapwood.models.encoder.names import ENCODERS

if TYPE_CHECKING:
    from sapwood.models.encoder.bert import Encoder
    from sapwood.models.lm.architecture import Architecture

ARCHITECTURES: Registry[type[Architecture] | type[Encoder]] = Registry(
    "architecture",
    {
        "Dots1ForCausalLM": "sapwood.models.lm.dots1:Dots1ForCausalLM",
        "FlexOlmoForCausalLM": "sapwood.models.lm.flex_olmo:FlexOlmoForCausalLM",
        "Gemma2ForCausalLM": "sapwood.models.lm.gemma2:Gemma2ForCausalLM",
        "GptOssForCausalLM": "sapwood.models.lm.gpt_oss:GptOssForCausalLM",
        "GemmaForCausalLM": "sapwood.models.lm.gemma:GemmaForCausalLM",
        "Glm4MoeForCausalLM": "sapwood.models.lm.glm4_moe:Glm4MoeForCausalLM",
        "GraniteForCausalLM": "sapwood.models.lm.granite:GraniteForCausalLM",
        "GraniteMoeForCausalLM": "sapwood.models.lm.granite_moe:GraniteMoeForCausalLM",
        "LlamaForCausalLM": "sapwood.models.lm.llama:LlamaForCausalLM",
        "MistralForCausalLM": "sapwood.models.lm.mistral:MistralForCausalLM",
        "MixtralForCausalLM": "sapwood.models.lm.mixtral:MixtralForCausalLM",
        "Olmo2ForCausalLM": "sapwood.models.lm.olmo2:Olmo2ForCausalLM",
        "OlmoeForCausalLM": "sapwood.models.lm.olmoe:OlmoeForCausalLM",
        "Qwen2ForCausalLM": "sapwood.models.lm.qwen2:Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM": "sapwood.models.lm.qwen2_moe:Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM": "sapwood.models.lm.qwen3:Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM": "sapwood.models.lm.qwen3_moe:Qwen3MoeForCausalLM",
        "SmolLM3ForCausalLM": "sapwood.models.lm.smollm3:SmolLM3ForCausalLM",
        "StableLmForCausalLM": "sapwood.models.lm.stablelm:StableLmForCausalLM",
        "Starcoder2ForCausalLM": "sapwood.models.lm.starcoder2:Starcoder2ForCausalLM",
        **ENCODERS,
    },
    entry_point="sapwood.architectures",
)


def decoder_class(name: str) -> type[Architecture]:
    """The class of a decoder's architecture; ConfigError for an unknown one and for encoders."""
    if name in ENCODERS:
        raise ConfigError(f"{name} is an encoder, which generates nothing; choose another model")
    return cast("type[Architecture]", ARCHITECTURES.get(name))


def encoder_class(name: str) -> type[Encoder]:
    """The class of an encoder, which is one of ENCODERS."""
    if name not in ENCODERS:
        raise ConfigError(f"{name} is no encoder; known: {', '.join(ENCODERS)}")
    return cast("type[Encoder]", ARCHITECTURES.get(name))


def read_decoder(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The facts of a decoder in its config.json.

    Raises ConfigError for an architecture that is not implemented, and for fields that are missing
    or whose value is not implemented."""
    return decoder_class(architecture_of(hf_config)).read(hf_config)
