"""What a family of vision models says about preparing its media, and the table of the families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from sapwood.base.errors import UnsupportedFeature
from sapwood.base.registry import Registry
from sapwood.multimodal.image import Pixels
from sapwood.schema.media_source import MediaKind

Tensor = NDArray[np.generic]


class FamilySetting(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a model say about its media.

    model_type  config.json's
    image       preprocessor_config.json, or the image processor of processor_config.json
    video       the same for the video processor
    processor   the rest of processor_config.json
    model       config.json
    tokens      kind -> text of the token whose place a medium's vectors take
    """

    model_type: str
    image: dict[str, Any] = {}
    video: dict[str, Any] = {}
    processor: dict[str, Any] = {}
    model: dict[str, Any] = {}
    tokens: dict[str, str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One medium as its model reads it.

    tensors      by the names that transformers' processors give them
    replacement  the text in place of the medium's marker in the prompt
    counts       for each of the family's tokens in `replacement`, how often it is repeated: the
                 medium has a vector for each
    parts        into how many media of their own this one may be cut, evenly along the first
                 dimension of all tensors and along `counts`, since its tower sees each part alone
    """

    tensors: Mapping[str, Tensor]
    replacement: str
    counts: tuple[int, ...]
    parts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Frames of a video that a family has chosen.

    frames   [height, width, 3] each, all of one size
    indices  their positions in the whole video
    total    frames of the whole video
    fps      frames per second of the whole video
    """

    frames: Sequence[Pixels]
    indices: Sequence[int]
    total: int
    fps: Fraction


class Family(Protocol):
    """One way of preparing.

    markers  kind -> the text that chat templates write in place of a medium; a kind that is not
             among them is refused
    tokens   kind -> the text of the token that is repeated
    """

    markers: Mapping[MediaKind, str]
    tokens: Mapping[MediaKind, str]

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared: ...

    def frames_of(self, total: int, fps: Fraction, options: Mapping[str, Any]) -> Sequence[int]:
        """Which frames of a video with so many the model should see."""
        ...

    def video(self, clip: Clip, options: Mapping[str, Any]) -> Prepared: ...


@runtime_checkable
class SoundFamily(Protocol):
    """One way of preparing sounds, beside or instead of pictures.

    longest  samples, at multimodal.mel.RATE, of one sound at most
    """

    @property
    def longest(self) -> int: ...

    def audio(self, samples: NDArray[np.int16]) -> Prepared: ...


class OnlyImages:
    """For families without video: says so."""

    def frames_of(self, total: int, fps: Fraction, options: Mapping[str, Any]) -> Sequence[int]:
        raise UnsupportedFeature("is a video, but this model takes only pictures")

    def video(self, clip: Clip, options: Mapping[str, Any]) -> Prepared:
        raise UnsupportedFeature("is a video, but this model takes only pictures")


_ROOM = "sapwood.multimodal.families"
_QWEN2 = f"{_ROOM}.qwen:Qwen2VL"
_QWEN3 = f"{_ROOM}.qwen:Qwen3VL"

_PIXTRAL = f"{_ROOM}.pixtral:Pixtral"
_LLAVA = f"{_ROOM}.single:Llava"
_GLM4V = f"{_ROOM}.glm:Glm4V"

FAMILIES: dict[str, str] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "aya_vision": f"{_ROOM}.tiled:AyaVision",
    "cohere2_vision": f"{_ROOM}.tiled:Cohere2Vision",
    "exaone4_5": _QWEN2,
    "glm46v": f"{_ROOM}.glm:Glm46V",
    "glm4v": _GLM4V,
    "glm4v_moe": _GLM4V,
    "glm_ocr": f"{_ROOM}.glm:Glm46V",
    "internvl_chat": f"{_ROOM}.tiled:InternVLChat",
    "lfm2_vl": f"{_ROOM}.lfm2_vl:Lfm2VL",
    "lighton_ocr": f"{_ROOM}.pixtral:LightOnOcr",
    "llama4": f"{_ROOM}.tiled:Llama4",
    "llava": _LLAVA,
    "llava_next": f"{_ROOM}.llava_next:LlavaNext",
    "llava_onevision": f"{_ROOM}.llava_next:LlavaOnevision",
    "paddleocr_vl": f"{_ROOM}.qwen:PaddleOcr",
    "qianfan_ocr": f"{_ROOM}.internvl:InternVL",
    "vipllava": _LLAVA,
    "gemma3": f"{_ROOM}.gemma3:Gemma3",
    "mistral3": _PIXTRAL,
    "idefics3": f"{_ROOM}.idefics3:Idefics3",
    "smolvlm": f"{_ROOM}.idefics3:Idefics3",
    "internvl": f"{_ROOM}.internvl:InternVL",
    "whisper": f"{_ROOM}.whisper:Whisper",
}
"""config.json's model_type -> the class that prepares its media."""

TOKENS: Mapping[str, Mapping[str, str]] = {"internvl_chat": {"image": "<IMG_CONTEXT>"}}
"""model_type -> kind -> text of the token that is repeated, where config.json does not say it."""

ONE_TOKEN = frozenset({"glm46v", "glm4v", "glm4v_moe", "glm_ocr"})
"""The model_types of families whose videos stand on pictures' tokens."""

_CLASSES = Registry[Callable[[FamilySetting], Family]](
    "family of vision models", FAMILIES | {"pixtral": _PIXTRAL}
)


def family_of(setting: FamilySetting) -> Family:
    return _CLASSES.get(_kind(setting))(setting)


def _kind(setting: FamilySetting) -> str:
    """Pixtral's first form calls itself LLaVA; its tower tells them apart."""
    tower = setting.model.get("vision_config") or {}
    is_pixtral = setting.model_type == "llava" and tower.get("model_type") == "pixtral"
    return "pixtral" if is_pixtral else setting.model_type
