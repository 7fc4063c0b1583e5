"""Which class builds an architecture, by the name that config.json gives it. No torch until one is
asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from sapwood.base.errors import ConfigError
from sapwood.base.registry import Registry
from sapwood.models.config import DecoderConfig, architecture_of
from sapwood.models.encoder.names import ENCODERS
from sapwood.models.text_part import text_part

if TYPE_CHECKING:
    from sapwood.models.encoder.bert import Encoder
    from sapwood.models.lm.architecture import Architecture

ARCHITECTURES: Registry[type[Architecture] | type[Encoder]] = Registry(
    "architecture",
    {
        "AfmoeForCausalLM": "sapwood.models.lm.afmoe:AfmoeForCausalLM",
        "ApertusForCausalLM": "sapwood.models.lm.apertus:ApertusForCausalLM",
        "AquilaForCausalLM": "sapwood.models.lm.llama:LlamaForCausalLM",
        "AquilaModel": "sapwood.models.lm.llama:LlamaForCausalLM",
        "ArceeForCausalLM": "sapwood.models.lm.arcee:ArceeForCausalLM",
        "BaichuanForCausalLM": "sapwood.models.lm.baichuan:BaichuanForCausalLM",
        "BailingHybridForCausalLM": ("sapwood.models.lm.bailing_hybrid:BailingHybridForCausalLM"),
        "BailingMoeForCausalLM": "sapwood.models.lm.bailing_moe:BailingMoeForCausalLM",
        "BailingMoeLinearV2ForCausalLM": (
            "sapwood.models.lm.bailing_linear:BailingMoeLinearV2ForCausalLM"
        ),
        "BailingMoeV2_5ForCausalLM": "sapwood.models.lm.bailing_linear:BailingMoeV2_5ForCausalLM",
        "BailingMoeV2ForCausalLM": "sapwood.models.lm.bailing_moe:BailingMoeV2ForCausalLM",
        "BailingMoeV3ForCausalLM": "sapwood.models.lm.bailing_hybrid:BailingHybridForCausalLM",
        "BaiChuanForCausalLM": "sapwood.models.lm.baichuan:BaichuanForCausalLM",
        "BambaForCausalLM": "sapwood.models.lm.bamba:BambaForCausalLM",
        "BloomForCausalLM": "sapwood.models.lm.bloom:BloomForCausalLM",
        "ChatGLMForConditionalGeneration": "sapwood.models.lm.chatglm:ChatGLMModel",
        "ChatGLMModel": "sapwood.models.lm.chatglm:ChatGLMModel",
        "Cohere2ForCausalLM": "sapwood.models.lm.cohere2:Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM": "sapwood.models.lm.cohere2_moe:Cohere2MoeForCausalLM",
        "CohereForCausalLM": "sapwood.models.lm.cohere:CohereForCausalLM",
        "CwmForCausalLM": "sapwood.models.lm.cwm:CwmForCausalLM",
        "DbrxForCausalLM": "sapwood.models.lm.dbrx:DbrxForCausalLM",
        "DeepseekForCausalLM": "sapwood.models.lm.deepseek:DeepseekForCausalLM",
        "DeepseekV2ForCausalLM": "sapwood.models.lm.deepseek_v2:DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM": "sapwood.models.lm.deepseek_v2:DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM": "sapwood.models.lm.deepseek_v32:DeepseekV32ForCausalLM",
        "DeciLMForCausalLM": "sapwood.models.lm.deci:DeciLMForCausalLM",
        "Dots1ForCausalLM": "sapwood.models.lm.dots1:Dots1ForCausalLM",
        "Ernie4_5_ForCausalLM": "sapwood.models.lm.ernie4_5:Ernie4_5ForCausalLM",
        "Ernie4_5_MoEForCausalLM": "sapwood.models.lm.ernie4_5_moe:Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeForCausalLM": "sapwood.models.lm.ernie4_5_moe:Ernie4_5_MoeForCausalLM",
        "Ernie4_5ForCausalLM": "sapwood.models.lm.ernie4_5:Ernie4_5ForCausalLM",
        "Exaone4ForCausalLM": "sapwood.models.lm.exaone4:Exaone4ForCausalLM",
        "ExaoneForCausalLM": "sapwood.models.lm.exaone:ExaoneForCausalLM",
        "ExaoneMoEForCausalLM": "sapwood.models.lm.exaone_moe:ExaoneMoeForCausalLM",
        "ExaoneMoeForCausalLM": "sapwood.models.lm.exaone_moe:ExaoneMoeForCausalLM",
        "FalconForCausalLM": "sapwood.models.lm.falcon:FalconForCausalLM",
        "FalconH1ForCausalLM": "sapwood.models.lm.falcon_h1:FalconH1ForCausalLM",
        "FalconMambaForCausalLM": "sapwood.models.lm.mamba:FalconMambaForCausalLM",
        "FlexOlmoForCausalLM": "sapwood.models.lm.flex_olmo:FlexOlmoForCausalLM",
        "Gemma2ForCausalLM": "sapwood.models.lm.gemma2:Gemma2ForCausalLM",
        "Gemma3ForCausalLM": "sapwood.models.lm.gemma3:Gemma3ForCausalLM",
        "Gemma3nForCausalLM": "sapwood.models.lm.gemma3n:Gemma3nForCausalLM",
        "Gemma4ForCausalLM": "sapwood.models.lm.gemma4:Gemma4ForCausalLM",
        "GemmaForCausalLM": "sapwood.models.lm.gemma:GemmaForCausalLM",
        "Glm4ForCausalLM": "sapwood.models.lm.glm4:Glm4ForCausalLM",
        "Glm4MoeForCausalLM": "sapwood.models.lm.glm4_moe:Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM": "sapwood.models.lm.glm4_moe_lite:Glm4MoeLiteForCausalLM",
        "GlmMoeDsaForCausalLM": "sapwood.models.lm.deepseek_v32:GlmMoeDsaForCausalLM",
        "GlmForCausalLM": "sapwood.models.lm.glm:GlmForCausalLM",
        "GlmOcrForCausalLM": "sapwood.models.lm.glm4:GlmOcrForCausalLM",
        "GPT2LMHeadModel": "sapwood.models.lm.gpt2:GPT2LMHeadModel",
        "GPTBigCodeForCausalLM": "sapwood.models.lm.gpt_bigcode:GPTBigCodeForCausalLM",
        "GPTJForCausalLM": "sapwood.models.lm.gptj:GPTJForCausalLM",
        "GPTNeoXForCausalLM": "sapwood.models.lm.gpt_neox:GPTNeoXForCausalLM",
        "GptOssForCausalLM": "sapwood.models.lm.gpt_oss:GptOssForCausalLM",
        "GraniteForCausalLM": "sapwood.models.lm.granite:GraniteForCausalLM",
        "GraniteMoeForCausalLM": "sapwood.models.lm.granite_moe:GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM": (
            "sapwood.models.lm.granite_moe_hybrid:GraniteMoeHybridForCausalLM"
        ),
        "GraniteMoeSharedForCausalLM": (
            "sapwood.models.lm.granite_moe_shared:GraniteMoeSharedForCausalLM"
        ),
        "GraniteMoeSWAForCausalLM": "sapwood.models.lm.granite_swa:GraniteMoeSWAForCausalLM",
        "GraniteSWAForCausalLM": "sapwood.models.lm.granite_swa:GraniteSWAForCausalLM",
        "HeliumForCausalLM": "sapwood.models.lm.helium:HeliumForCausalLM",
        "HunYuanDenseV1ForCausalLM": "sapwood.models.lm.hunyuan:HunYuanDenseV1ForCausalLM",
        "HunYuanMoEV1ForCausalLM": "sapwood.models.lm.hunyuan_moe:HunYuanMoEV1ForCausalLM",
        "HyperCLOVAXForCausalLM": "sapwood.models.lm.hyperclovax:HyperCLOVAXForCausalLM",
        "HYV3ForCausalLM": "sapwood.models.lm.hy_v3:HYV3ForCausalLM",
        "InternLM2ForCausalLM": "sapwood.models.lm.internlm:InternLM2ForCausalLM",
        "InternLM3ForCausalLM": "sapwood.models.lm.internlm:InternLM3ForCausalLM",
        "InternLMForCausalLM": "sapwood.models.lm.internlm:InternLMForCausalLM",
        "IQuestCoderForCausalLM": "sapwood.models.lm.iquestcoder:IQuestCoderForCausalLM",
        "Jais2ForCausalLM": "sapwood.models.lm.jais2:Jais2ForCausalLM",
        "JambaForCausalLM": "sapwood.models.lm.jamba:JambaForCausalLM",
        "JetNemotronForCausalLM": "sapwood.models.lm.jet_nemotron:JetNemotronForCausalLM",
        "KimiLinearForCausalLM": "sapwood.models.lm.kimi_linear:KimiLinearForCausalLM",
        "Lfm2ForCausalLM": "sapwood.models.lm.lfm2:Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM": "sapwood.models.lm.lfm2_moe:Lfm2MoeForCausalLM",
        "Llama4ForCausalLM": "sapwood.models.lm.llama4:Llama4ForCausalLM",
        "LlamaForCausalLM": "sapwood.models.lm.llama:LlamaForCausalLM",
        "LLaMAForCausalLM": "sapwood.models.lm.llama:LlamaForCausalLM",
        "LongcatFlashForCausalLM": "sapwood.models.lm.longcat_flash:LongcatFlashForCausalLM",
        "MambaForCausalLM": "sapwood.models.lm.mamba:MambaForCausalLM",
        "Mamba2ForCausalLM": "sapwood.models.lm.mamba2:Mamba2ForCausalLM",
        "MellumForCausalLM": "sapwood.models.lm.mellum:MellumForCausalLM",
        "MiMoForCausalLM": "sapwood.models.lm.mimo:MiMoForCausalLM",
        "MiMoV2FlashForCausalLM": "sapwood.models.lm.mimo_v2_flash:MiMoV2FlashForCausalLM",
        "MiniCPM3ForCausalLM": "sapwood.models.lm.minicpm3:MiniCPM3ForCausalLM",
        "MiniCPMForCausalLM": "sapwood.models.lm.minicpm:MiniCPMForCausalLM",
        "MiniMaxForCausalLM": "sapwood.models.lm.minimax:MiniMaxForCausalLM",
        "MiniMaxM1ForCausalLM": "sapwood.models.lm.minimax:MiniMaxForCausalLM",
        "MiniMaxM2ForCausalLM": "sapwood.models.lm.minimax_m2:MiniMaxM2ForCausalLM",
        "MiniMaxText01ForCausalLM": "sapwood.models.lm.minimax:MiniMaxForCausalLM",
        "Ministral3ForCausalLM": "sapwood.models.lm.ministral:Ministral3ForCausalLM",
        "MinistralForCausalLM": "sapwood.models.lm.ministral:MinistralForCausalLM",
        "MistralLarge3ForCausalLM": "sapwood.models.lm.deepseek_v2:DeepseekV3ForCausalLM",
        "MistralForCausalLM": "sapwood.models.lm.mistral:MistralForCausalLM",
        "MixtralForCausalLM": "sapwood.models.lm.mixtral:MixtralForCausalLM",
        "MptForCausalLM": "sapwood.models.lm.mpt:MptForCausalLM",
        "NemotronForCausalLM": "sapwood.models.lm.nemotron:NemotronForCausalLM",
        "NemotronHForCausalLM": "sapwood.models.lm.nemotron_h:NemotronHForCausalLM",
        "Olmo2ForCausalLM": "sapwood.models.lm.olmo2:Olmo2ForCausalLM",
        "Olmo3ForCausalLM": "sapwood.models.lm.olmo3:Olmo3ForCausalLM",
        "OlmoeForCausalLM": "sapwood.models.lm.olmoe:OlmoeForCausalLM",
        "OlmoHybridForCausalLM": "sapwood.models.lm.olmo_hybrid:OlmoHybridForCausalLM",
        "OlmoForCausalLM": "sapwood.models.lm.olmo:OlmoForCausalLM",
        "OPTForCausalLM": "sapwood.models.lm.opt:OPTForCausalLM",
        "OrionForCausalLM": "sapwood.models.lm.orion:OrionForCausalLM",
        "PaddleOcrForCausalLM": "sapwood.models.lm.ernie4_5:PaddleOcrForCausalLM",
        "PersimmonForCausalLM": "sapwood.models.lm.persimmon:PersimmonForCausalLM",
        "Phi3ForCausalLM": "sapwood.models.lm.phi3:Phi3ForCausalLM",
        "PhiForCausalLM": "sapwood.models.lm.phi:PhiForCausalLM",
        "PhiMoEForCausalLM": "sapwood.models.lm.phimoe:PhimoeForCausalLM",
        "PhimoeForCausalLM": "sapwood.models.lm.phimoe:PhimoeForCausalLM",
        "Qwen2ForCausalLM": "sapwood.models.lm.qwen2:Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM": "sapwood.models.lm.qwen2_moe:Qwen2MoeForCausalLM",
        "Qwen3_5ForCausalLM": "sapwood.models.lm.qwen3_5:Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM": "sapwood.models.lm.qwen3_5:Qwen3_5MoeForCausalLM",
        "Qwen3ForCausalLM": "sapwood.models.lm.qwen3:Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM": "sapwood.models.lm.qwen3_moe:Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM": "sapwood.models.lm.qwen3_next:Qwen3NextForCausalLM",
        "QWenLMHeadModel": "sapwood.models.lm.qwen:QWenLMHeadModel",
        "SeedOssForCausalLM": "sapwood.models.lm.seed_oss:SeedOssForCausalLM",
        "SmolLM3ForCausalLM": "sapwood.models.lm.smollm3:SmolLM3ForCausalLM",
        "SolarOpenForCausalLM": "sapwood.models.lm.solar_open:SolarOpenForCausalLM",
        "SolarForCausalLM": "sapwood.models.lm.solar:SolarForCausalLM",
        "StableLMEpochForCausalLM": "sapwood.models.lm.stablelm:StableLmForCausalLM",
        "StableLmForCausalLM": "sapwood.models.lm.stablelm:StableLmForCausalLM",
        "Starcoder2ForCausalLM": "sapwood.models.lm.starcoder2:Starcoder2ForCausalLM",
        "TeleFLMForCausalLM": "sapwood.models.lm.teleflm:TeleFLMForCausalLM",
        "VaultGemmaForCausalLM": "sapwood.models.lm.vaultgemma:VaultGemmaForCausalLM",
        "WhisperForConditionalGeneration": (
            "sapwood.models.audio.whisper:WhisperForConditionalGeneration"
        ),
        "XverseForCausalLM": "sapwood.models.lm.llama:LlamaForCausalLM",
        "YiForCausalLM": "sapwood.models.lm.llama:LlamaForCausalLM",
        "YoutuForCausalLM": "sapwood.models.lm.youtu:YoutuForCausalLM",
        "Zamba2ForCausalLM": "sapwood.models.lm.zamba2:Zamba2ForCausalLM",
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
    """The facts of a decoder in its config.json, or of the decoder that is a model's text part.

    Raises ConfigError for an architecture that is not implemented, and for fields that are missing
    or whose value is not implemented."""
    found = text_part(hf_config)
    return decoder_class(architecture_of(found)).read(found)
