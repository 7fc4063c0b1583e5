"""Pixtral and Mistral 3: pictures keep their shape; each row of patches ends with a token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sapwood.multimodal.families.constants import CLIP_MEAN, CLIP_STD
from sapwood.multimodal.family import FamilySetting, OnlyImages, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.resize import PixelSettings
from sapwood.schema.media_source import MediaKind


class Pixtral(OnlyImages):
    def __init__(self, setting: FamilySetting) -> None:
        processor = setting.processor
        token = processor.get("image_token") or setting.tokens.get("image", "[IMG]")
        self.tokens: dict[MediaKind, str] = {"image": token}
        self.markers = self.tokens
        self._break = processor.get("image_break_token", "[IMG_BREAK]")
        self._end = processor.get("image_end_token", "[IMG_END]")
        self._pixels = PixelSettings.of(setting.image, mean=CLIP_MEAN, std=CLIP_STD)
        tower = setting.model.get("vision_config") or {}
        patch = processor.get("patch_size") or tower.get("patch_size", 16)
        merge = processor.get("spatial_merge_size") or setting.model.get("spatial_merge_size", 1)
        self._step = patch * merge
        size = setting.image.get("size") or {"longest_edge": 1024}
        edge = size.get("longest_edge")
        self._most = (edge, edge) if edge else (size["height"], size["width"])

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        rows, columns = self._grid(*pixels.shape[:2])
        height, width = rows * self._step, columns * self._step
        values = self._pixels.channels_first(self._pixels.resized(pixels, height, width))
        text, counts = self._text(rows, columns)
        return Prepared(
            tensors={
                "pixel_values": values[None],
                "image_sizes": np.array([[height, width]], dtype=np.int64),
            },
            replacement=text,
            counts=counts,
        )

    def _text(self, rows: int, columns: int) -> tuple[str, tuple[int, ...]]:
        line = self.tokens["image"] + self._break
        return line * (rows - 1) + self.tokens["image"] + self._end, (columns,) * rows

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        ratio = max(height / self._most[0], width / self._most[1])
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        return max(1, -(-height // self._step)), max(1, -(-width // self._step))


class LightOnOcr(Pixtral):
    """Nothing stands between the rows."""

    def _text(self, rows: int, columns: int) -> tuple[str, tuple[int, ...]]:
        return self.tokens["image"], (rows * columns,)
