"""LLaVA-NeXT and LLaVA-OneVision: the whole picture small, then tiles of it fitted into a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sapwood.base.errors import ConfigError
from sapwood.multimodal.families.constants import CLIP_MEAN, CLIP_STD
from sapwood.multimodal.family import FamilySetting, OnlyImages, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.resize import PixelSettings
from sapwood.schema.media_source import MediaKind
from sapwood.schema.tile_grids import best_grid, shrunk, unpadded


class LlavaNext(OnlyImages):
    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, setting: FamilySetting) -> None:
        self.tokens: dict[MediaKind, str] = {"image": setting.tokens.get("image", "<image>")}
        self.markers = self.tokens
        settings, model = setting.image, setting.model
        self._pixels = PixelSettings.of(settings, mean=self.mean, std=self.std)
        tower = model.get("vision_config") or {}
        size = settings.get("size") or {}
        self._side = int(
            size.get("height") or size.get("shortest_edge") or tower.get("image_size") or 336
        )
        patch = setting.processor.get("patch_size") or tower.get("patch_size", 14)
        self._patches = self._side // int(patch)
        pins = settings.get("image_grid_pinpoints") or model.get("image_grid_pinpoints") or []
        self._pins = [(int(tall), int(wide)) for tall, wide in pins]
        if not self._pins:
            raise ConfigError("the model's files have no image_grid_pinpoints")
        said = str(model.get("vision_aspect_ratio") or "anyres_max_9")
        self._most_tiles = int(said.removeprefix("anyres_max_"))

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        height, width = pixels.shape[:2]
        tall, wide = best_grid((height, width), self._pins)
        side = self._side
        small = self._pixels.resized(pixels, side, side)
        large = self._pixels.resized(pixels, *_inside(height, width, tall, wide))
        frame = np.zeros((tall, wide, 3), dtype=np.uint8)
        top, left = (tall - large.shape[0]) // 2, (wide - large.shape[1]) // 2
        frame[top : top + large.shape[0], left : left + large.shape[1]] = large
        tiles = [
            frame[row : row + side, column : column + side]
            for row in range(0, tall, side)
            for column in range(0, wide, side)
        ]
        values = np.stack([self._pixels.channels_first(tile) for tile in (small, *tiles)])
        return Prepared(
            tensors={
                "pixel_values": values,
                "image_sizes": np.array([height, width], dtype=np.int64),
            },
            replacement=self.tokens["image"],
            counts=(self._count(height, width, tall // side, wide // side),),
        )

    def _count(self, height: int, width: int, rows: int, columns: int) -> int:
        side = self._patches
        _, (tall, wide) = unpadded((height, width), (rows * side, columns * side))
        tall, wide = self._shown(tall, wide)
        return side**2 + tall * (wide + 1)

    def _shown(self, tall: int, wide: int) -> tuple[int, int]:
        return tall, wide


class LlavaOnevision(LlavaNext):
    """Large pictures have no more vectors than some tiles."""

    def _shown(self, tall: int, wide: int) -> tuple[int, int]:
        return shrunk((tall, wide), self._most_tiles * self._patches**2)


def _inside(height: int, width: int, tall: int, wide: int) -> tuple[int, int]:
    """The largest size of these proportions inside of (tall, wide)."""
    if wide / width < tall / height:
        return min(math.ceil(height * (wide / width)), tall), wide
    return tall, min(math.ceil(width * (tall / height)), wide)
