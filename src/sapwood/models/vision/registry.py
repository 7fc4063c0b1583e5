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
        "Idefics3ForConditionalGeneration": "sapwood.models.vision.idefics3:Idefics3Tower",
        "InternVLForConditionalGeneration": "sapwood.models.vision.internvl:InternVLTower",
        "LlavaForConditionalGeneration": "sapwood.models.vision.llava:LlavaTower",
        "Mistral3ForConditionalGeneration": "sapwood.models.vision.pixtral:Mistral3Tower",
        "Qwen2_5_VLForConditionalGeneration": "sapwood.models.vision.qwen2_5_vl:Qwen25VLTower",
        "Qwen2VLForConditionalGeneration": "sapwood.models.vision.qwen2_vl:Qwen2VLTower",
        "Qwen3VLForConditionalGeneration": "sapwood.models.vision.qwen3_vl:Qwen3VLTower",
        "Qwen3_5ForConditionalGeneration": "sapwood.models.vision.qwen3_vl:Qwen35Tower",
        "SmolVLMForConditionalGeneration": "sapwood.models.vision.idefics3:Idefics3Tower",
        "WhisperForConditionalGeneration": "sapwood.models.audio.whisper:WhisperTower",
    },
    entry_point="sapwood.towers",
)


def tower_class(hf_config: Mapping[str, Any]) -> type[Tower] | None:
    """The tower of the model with that config.json; None: it has none that is implemented."""
    name = architecture_of(hf_config)
    return TOWERS.get(name) if name in TOWERS.names() else None
