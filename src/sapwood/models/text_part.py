"""The text part of a model that also sees or hears, from its config.json. No torch.

Such a model is served without images and sounds: its text part is a decoder like others, whose
config.json is a field of the whole model's, and whose tensors have a longer name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sapwood.base.errors import ConfigError

_LLAMA = "LlamaForCausalLM"
_MISTRAL = "MistralForCausalLM"
_QWEN2 = "Qwen2ForCausalLM"
_QWEN3 = "Qwen3ForCausalLM"

TEXT_ARCHITECTURES: Mapping[str, str] = {
    "cohere2": "Cohere2ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "glm4v_moe_text": "Glm4MoeForCausalLM",
    "glm4v_text": "Glm4ForCausalLM",
    "glm_ocr_text": "GlmOcrForCausalLM",
    "granite": "GraniteForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "llama": _LLAMA,
    "llama4_text": "Llama4ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": _MISTRAL,
    "paddleocr_vl_text": "PaddleOcrForCausalLM",
    "qwen2": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": _QWEN3,
    "smollm3": "SmolLM3ForCausalLM",
}
"""model_type of the text part -> the architecture of the same decoder. Where positions of images
have three parts, those of text are three equal ones, which rotate like one."""

_GEMMA3 = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262_208,
    "num_hidden_layers": 26,
    "hidden_size": 2304,
    "intermediate_size": 9216,
}
_LLAMA_2 = {
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "max_position_embeddings": 2048,
    "vocab_size": 32_000,
}
_GLM4V = {"rms_norm_eps": 1e-5}
_NOTHING: Mapping[str, Any] = MappingProxyType({})

WRAPPERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "AyaVisionForConditionalGeneration": ("cohere2", _NOTHING),
    "Cohere2VisionForConditionalGeneration": ("cohere2", _NOTHING),
    "Exaone4_5_ForConditionalGeneration": ("exaone4", _NOTHING),
    "Gemma3ForConditionalGeneration": ("gemma3_text", _GEMMA3),
    "Gemma3nForConditionalGeneration": ("gemma3n_text", _NOTHING),
    "Gemma4ForConditionalGeneration": ("gemma4_text", _NOTHING),
    "Glm46VForConditionalGeneration": ("glm4v_text", _GLM4V),
    "Glm4vForConditionalGeneration": ("glm4v_text", _GLM4V),
    "Glm4vMoeForConditionalGeneration": ("glm4v_moe_text", {"attention_bias": True}),
    "GlmOcrForConditionalGeneration": ("glm_ocr_text", _NOTHING),
    "Idefics3ForConditionalGeneration": ("llama", _NOTHING),
    "InternVLChatModel": ("qwen2", _NOTHING),
    "InternVLForConditionalGeneration": ("qwen2", _NOTHING),
    "Lfm2VlForConditionalGeneration": ("lfm2", _NOTHING),
    "LightOnOcrForConditionalGeneration": ("qwen3", _NOTHING),
    "Llama4ForConditionalGeneration": ("llama4_text", _NOTHING),
    "LlavaForConditionalGeneration": ("llama", _LLAMA_2),
    "LlavaNextForConditionalGeneration": ("llama", _LLAMA_2),
    "LlavaOnevisionForConditionalGeneration": ("qwen2", _NOTHING),
    "Mistral3ForConditionalGeneration": ("mistral", _NOTHING),
    "PaddleOCRVLForConditionalGeneration": ("paddleocr_vl_text", _NOTHING),
    "QianfanOCRForConditionalGeneration": ("qwen3", _NOTHING),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl_text", _NOTHING),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl_text", _NOTHING),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe_text", {"norm_topk_prob": True}),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl_text", _NOTHING),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5_text", _NOTHING),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe_text", _NOTHING),
    "SmolVLMForConditionalGeneration": ("llama", _NOTHING),
    "VipLlavaForConditionalGeneration": ("llama", _LLAMA_2),
}
"""Architecture of the whole model -> model_type of its text part, if that does not say it, and the
part's fields that config.json may leave out."""

IS_TEXT_PART = "is_text_part"
"""The field of a config.json that `text_part` made of a larger one."""

_LONGER_NAMES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_OTHER_PARTS = (
    *("vision_tower", "vision_model", "visual", "vision_embed_tokens", "audio_tower"),
    *("multi_modal_projector", "connector", "embed_vision", "embed_audio", "image_newline"),
    *("vision_encoder", "vision_projection", "mlp1", "projector", "mlp_AR"),
)
OTHER_TENSORS = tuple(
    f"{prefix}{part}{rest}"
    for prefix in ("", "model.")
    for part in _OTHER_PARTS
    for rest in ("", ".*")
)
"""Patterns of tensors that are not of the text part."""


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the text part, of a model that has other parts too; else the same one.

    Raises ConfigError if the text part is of a kind that is not served."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in WRAPPERS:
        return config
    usual, absent = WRAPPERS[names[0]]
    said = config.get("text_config") or config.get("llm_config")
    if said is None:  # the first files of some models have the text part's fields beside others
        said = {name: value for name, value in config.items() if name != "model_type"}
    if not isinstance(said, Mapping):
        raise ConfigError(f"config.json must have an object as 'text_config', got {said!r}")
    kind = said.get("model_type") or usual
    if kind not in TEXT_ARCHITECTURES:
        raise ConfigError(
            f"the text part of this {names[0]} is of the kind {kind!r}, which is not implemented "
            f"there; known: {', '.join(TEXT_ARCHITECTURES)}"
        )
    # What the whole model says of both counts; nothing that is null says anything.
    whole = {
        name: config[name]
        for name in ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
        if config.get(name) is not None
    }
    own = {name: value for name, value in said.items() if value is not None}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(own.get(name), Mapping):
            own[name] = _without_sections(own[name])
    return {
        **absent,
        **own,
        **whole,
        "architectures": [TEXT_ARCHITECTURES[kind]],
        IS_TEXT_PART: True,
    }


def _without_sections(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rotation of text, whose positions in time, height and width are equal."""
    said = {name: value for name, value in rope.items() if value != "mrope"}
    return {name: value for name, value in said.items() if not name.startswith("mrope_")}


def text_name(name: str) -> str:
    """A tensor's name in a checkpoint of the text part alone."""
    for longer, own in _LONGER_NAMES:
        if name.startswith(longer):
            return own + name.removeprefix(longer)
    return name
