"""InternVL in transformers' form: tiles in the grid that fits best, then the whole picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sapwood.multimodal.families.constants import CLIP_MEAN, CLIP_STD
from sapwood.multimodal.family import FamilySetting, OnlyImages, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.resize import PixelSettings
from sapwood.schema.media_source import MediaKind

MOST_TILES = 64
"""Whatever a request's max_dynamic_patch says."""


class InternVL(OnlyImages):
    def __init__(self, setting: FamilySetting) -> None:
        token = setting.tokens.get("image", "<IMG_CONTEXT>")
        self.tokens: dict[MediaKind, str] = {"image": token}
        self.markers = self.tokens
        settings = setting.image
        self._pixels = PixelSettings.of(settings, mean=CLIP_MEAN, std=CLIP_STD)
        size = settings.get("size") or {"height": 448, "width": 448}
        self._height, self._width = size["height"], size["width"]
        self._splits = settings.get("crop_to_patches", False)
        self._least = settings.get("min_patches", 1)
        self._most = settings.get("max_patches", 12)
        self._length = setting.processor.get("image_seq_length") or 256

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        tiles = self.cut(pixels, options)
        token = self.tokens["image"]
        return Prepared(
            tensors={"pixel_values": np.stack([self._pixels.channels_first(t) for t in tiles])},
            replacement=f"<img>{token}</img>",
            counts=(self._length * len(tiles),),
        )

    def cut(self, pixels: Pixels, options: Mapping[str, Any]) -> list[Pixels]:
        """Tiles, then the whole picture if there are several."""
        most = min(MOST_TILES, int(options.get("max_dynamic_patch", self._most)))
        least = min(most, int(options.get("min_dynamic_patch", self._least)))
        splits = self._splits or "max_dynamic_patch" in options
        tiles = self._tiles(pixels, least, most) if splits and most > 1 else []
        return tiles or [self._pixels.resized(pixels, self._height, self._width)]

    def _tiles(self, pixels: Pixels, least: int, most: int) -> list[Pixels]:
        tall, wide = self._height, self._width
        columns, rows = self._grid(pixels.shape[0], pixels.shape[1], least, most)
        whole = self._pixels.resized(pixels, rows * tall, columns * wide)
        tiles = [
            whole[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            for row in range(rows)
            for column in range(columns)
        ]
        if len(tiles) > 1:
            tiles.append(self._pixels.resized(pixels, tall, wide))
        return tiles

    def _grid(self, height: int, width: int, least: int, most: int) -> tuple[int, int]:
        return nearest_grid(height, width, least, most, (self._height, self._width))


def nearest_grid(
    height: int, width: int, least: int, most: int, tile: tuple[int, int]
) -> tuple[int, int]:
    """(columns, rows) of so many tiles whose shape is nearest to the picture's; of equal ones the
    larger, while the picture has half of its pixels."""
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= columns * rows <= most
    ]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        is_filled = width * height > 0.5 * tile[0] * tile[1] * columns * rows
        if distance < nearest or (distance == nearest and is_filled):
            best, nearest = (columns, rows), distance
    return best
