"""LLaVA 1.5: every picture becomes one square, as CLIP and SigLIP want it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sapwood.multimodal.families.constants import CLIP_MEAN, CLIP_STD
from sapwood.multimodal.family import FamilySetting, OnlyImages, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.resize import PixelSettings, centre_crop
from sapwood.schema.media_source import MediaKind


class Square:
    """CLIP's and SigLIP's own preparing, without any prompt."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.pixels = PixelSettings.of(settings, mean=CLIP_MEAN, std=CLIP_STD)
        size = settings.get("size", {"shortest_edge": 224})
        self._size: dict[str, int] = {"shortest_edge": size} if isinstance(size, int) else size
        crop = settings.get("crop_size") or {}
        self._crop: dict[str, int] = (
            {"height": crop, "width": crop} if isinstance(crop, int) else crop
        )
        self._resizes = settings.get("do_resize", True)
        # SigLIP's files have no crop at all.
        self._crops = settings.get("do_center_crop", bool(crop)) and bool(self._crop)
        self._pads = bool(settings.get("do_pad", False))
        self._background = tuple(int(value * 255) for value in self.pixels.mean.tolist())

    def __call__(self, picture: Pixels) -> Pixels:
        if self._pads:
            picture = _on_square(picture, self._background)
        if self._resizes:
            height, width = self._target(*picture.shape[:2])
            picture = self.pixels.resized(picture, height, width)
        if self._crops:
            picture = centre_crop(picture, self._crop["height"], self._crop["width"])
        return picture

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if "shortest_edge" not in self._size:
            return self._size["height"], self._size["width"]
        edge = self._size["shortest_edge"]
        short, long = sorted((height, width))
        other = int(edge * long / short)
        return (edge, other) if height <= width else (other, edge)


class Llava(OnlyImages):
    def __init__(self, setting: FamilySetting) -> None:
        self.tokens: dict[MediaKind, str] = {"image": setting.tokens.get("image", "<image>")}
        self.markers = self.tokens
        self._square = Square(setting.image)
        processor, model = setting.processor, setting.model
        tower = model.get("vision_config") or {}
        self._patch = processor.get("patch_size") or tower.get("patch_size", 14)
        self._extra = processor.get("num_additional_image_tokens", 1)
        self._strategy = processor.get("vision_feature_select_strategy") or model.get(
            "vision_feature_select_strategy", "default"
        )

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        values = self._square.pixels.channels_first(self._square(pixels))
        _, height, width = values.shape
        count = (height // self._patch) * (width // self._patch) + self._extra
        if self._strategy == "default":
            count -= 1
        return Prepared(
            tensors={"pixel_values": values[None]},
            replacement=self.tokens["image"],
            counts=(count,),
        )


def _on_square(picture: Pixels, background: tuple[int, ...]) -> Pixels:
    height, width = picture.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = background
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square
