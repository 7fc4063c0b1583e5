"""Idefics3 and SmolVLM: tiles in rows and columns, each named in the prompt, and the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from sapwood.multimodal.families.constants import HALF
from sapwood.multimodal.family import FamilySetting, OnlyImages, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.resize import PixelSettings
from sapwood.schema.media_source import MediaKind

LONGEST_EDGE = 4096
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


class Idefics3(OnlyImages):
    def __init__(self, setting: FamilySetting) -> None:
        self.tokens: dict[MediaKind, str] = {"image": setting.tokens.get("image", "<image>")}
        self.markers = self.tokens
        settings = setting.image
        self._pixels = PixelSettings.of(
            settings, mean=HALF, std=HALF, resample=Image.Resampling.LANCZOS
        )
        self._edge = (settings.get("size") or {}).get("longest_edge", 4 * 364)
        self._tile = (settings.get("max_image_size") or {}).get("longest_edge", 364)
        self._splits = settings.get("do_image_splitting", True)
        self._resizes = settings.get("do_resize", True)
        self._length = setting.processor.get("image_seq_len") or 169

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        if self._resizes:
            pixels = self._pixels.resized(pixels, *self._fitted(*pixels.shape[:2]))
        rows = columns = 0
        tiles = []
        if self._splits:
            pixels = self._pixels.resized(pixels, *self._whole_tiles(*pixels.shape[:2]))
            rows, columns = (side // self._tile for side in pixels.shape[:2])
            if rows * columns == 1:
                rows = columns = 0
            tiles = [
                pixels[
                    row * self._tile : (row + 1) * self._tile,
                    column * self._tile : (column + 1) * self._tile,
                ]
                for row in range(rows)
                for column in range(columns)
            ]
        tiles.append(self._pixels.resized(pixels, self._tile, self._tile))
        values = np.stack([self._pixels.channels_first(tile) for tile in tiles])
        mask = np.ones((len(tiles), self._tile, self._tile), dtype=np.int64)
        return Prepared(
            tensors={"pixel_values": values, "pixel_attention_mask": mask},
            replacement=self._text(rows, columns),
            counts=(self._length,) * len(tiles),
            parts=len(tiles),
        )

    def _text(self, rows: int, columns: int) -> str:
        token = self.tokens["image"]
        whole = f"{AROUND}{WHOLE}{token}{AROUND}"
        if not rows:
            return whole
        lines = [
            "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{token}" for column in range(columns))
            for row in range(rows)
        ]
        return "\n".join(lines) + f"\n\n{whole}"

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        """The longer side becomes the file's `longest_edge`."""
        shape = width / height
        if width >= height:
            width = self._edge
            height = int(width / shape)
            height += height % 2
        else:
            height = self._edge
            width = int(height * shape)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        shape = width / height
        if width >= height and width > LONGEST_EDGE:
            width, height = LONGEST_EDGE, int(LONGEST_EDGE / shape)
        elif height > width and height > LONGEST_EDGE:
            height, width = LONGEST_EDGE, int(LONGEST_EDGE * shape)
        return max(height, 1), max(width, 1)

    def _whole_tiles(self, height: int, width: int) -> tuple[int, int]:
        """Both sides become multiples of the tile's."""
        shape, tile = width / height, self._tile
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = math.ceil(int(width / shape) / tile) * tile
        else:
            height = math.ceil(height / tile) * tile
            width = math.ceil(int(height * shape) / tile) * tile
        return height, width
