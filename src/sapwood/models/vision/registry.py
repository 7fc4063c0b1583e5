"""Which towers there are, by the architecture of the whole model. No torch until one is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sapwood.base.registry import Registry
from sapwood.models.config import architecture_of

if TYPE_CHECKING:
    from sapwood.models.vision.interface import Tower

TOWERS: Registry[type[Tower]] = Registry(
    "tower",
    {
        "AyaVisionForConditionalGeneration": "sapwood.models.vision.cohere:AyaVisionTower",
        "Cohere2VisionForConditionalGeneration": "sapwood.models.vision.cohere:Cohere2VisionTower",
        "Exaone4_5_ForConditionalGeneration": "sapwood.models.vision.qwen2_5_vl:Exaone45Tower",
        "Gemma3ForConditionalGeneration": "sapwood.models.vision.gemma3:Gemma3Tower",
        "Glm46VForConditionalGeneration": "sapwood.models.vision.glm4v:Glm4VTower",
        "Glm4vForConditionalGeneration": "sapwood.models.vision.glm4v:Glm4VTower",
        "Glm4vMoeForConditionalGeneration": "sapwood.models.vision.glm4v:Glm4VTower",
        "GlmOcrForConditionalGeneration": "sapwood.models.vision.glm4v:GlmOcrTower",
        "Idefics3ForConditionalGeneration": "sapwood.models.vision.idefics3:Idefics3Tower",
        "InternVLChatModel": "sapwood.models.vision.internvl:InternVLChatTower",
        "InternVLForConditionalGeneration": "sapwood.models.vision.internvl:InternVLTower",
        "Lfm2VlForConditionalGeneration": "sapwood.models.vision.lfm2_vl:Lfm2VLTower",
        "LightOnOcrForConditionalGeneration": "sapwood.models.vision.pixtral:LightOnOcrTower",
        "Llama4ForConditionalGeneration": "sapwood.models.vision.llama4:Llama4Tower",
        "LlavaForConditionalGeneration": "sapwood.models.vision.llava:LlavaTower",
        "LlavaNextForConditionalGeneration": "sapwood.models.vision.llava_next:LlavaNextTower",
        "LlavaOnevisionForConditionalGeneration": (
            "sapwood.models.vision.llava_next:LlavaOnevisionTower"
        ),
        "Mistral3ForConditionalGeneration": "sapwood.models.vision.pixtral:Mistral3Tower",
        "PaddleOCRVLForConditionalGeneration": "sapwood.models.vision.paddleocr_vl:PaddleOcrTower",
        "QianfanOCRForConditionalGeneration": "sapwood.models.vision.internvl:InternVLChatTower",
        "Qwen2_5_VLForConditionalGeneration": "sapwood.models.vision.qwen2_5_vl:Qwen25VLTower",
        "Qwen2VLForConditionalGeneration": "sapwood.models.vision.qwen2_vl:Qwen2VLTower",
        "Qwen3VLForConditionalGeneration": "sapwood.models.vision.qwen3_vl:Qwen3VLTower",
        "Qwen3VLMoeForConditionalGeneration": "sapwood.models.vision.qwen3_vl:Qwen3VLTower",
        "Qwen3_5ForConditionalGeneration": "sapwood.models.vision.qwen3_vl:Qwen35Tower",
        "Qwen3_5MoeForConditionalGeneration": "sapwood.models.vision.qwen3_vl:Qwen35Tower",
        "SmolVLMForConditionalGeneration": "sapwood.models.vision.idefics3:Idefics3Tower",
        "VipLlavaForConditionalGeneration": "sapwood.models.vision.llava:VipLlavaTower",
        "WhisperForConditionalGeneration": "sapwood.models.audio.whisper:WhisperTower",
    },
    entry_point="sapwood.towers",
)


def tower_class(hf_config: Mapping[str, Any]) -> type[Tower] | None:
    """The tower of the model with that config.json; None: it has none that is implemented."""
    name = architecture_of(hf_config)
    if name == "LlavaForConditionalGeneration" and _tower_kind(hf_config) == "pixtral":
        from sapwood.models.vision.pixtral import PixtralTower

        return PixtralTower
    return TOWERS.get(name) if name in TOWERS.names() else None


def _tower_kind(hf_config: Mapping[str, Any]) -> object:
    """Pixtral's first form calls itself LLaVA; its tower tells them apart."""
    vision = hf_config.get("vision_config")
    return vision.get("model_type") if isinstance(vision, Mapping) else None
