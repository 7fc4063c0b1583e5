"""LFM2-VL: small pictures keep their shape; of large ones there are tiles and the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from sapwood.multimodal.families.constants import HALF
from sapwood.multimodal.families.internvl import nearest_grid
from sapwood.multimodal.family import FamilySetting, OnlyImages, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.resize import Floats, PixelSettings
from sapwood.schema.media_source import MediaKind


class Lfm2VL(OnlyImages):
    def __init__(self, setting: FamilySetting) -> None:
        self.tokens: dict[MediaKind, str] = {"image": setting.tokens.get("image", "<image>")}
        self.markers = self.tokens
        said = setting.image
        self._pixels = PixelSettings.of(
            said, mean=HALF, std=HALF, resample=Image.Resampling.BILINEAR
        )
        self._merge = int(said.get("downsample_factor", 2))
        self._patch = int(said.get("encoder_patch_size", 16))
        self._side = int(said.get("tile_size", 512))
        self._area = tuple(
            int(said.get(name, usual)) * (self._patch * self._merge) ** 2
            for name, usual in (("min_image_tokens", 64), ("max_image_tokens", 256))
        )
        self._tolerance = float(said.get("max_pixels_tolerance", 2.0))
        self._least, self._most = int(said.get("min_tiles", 2)), int(said.get("max_tiles", 10))
        self._splits = said.get("do_image_splitting", True) and (self._least, self._most) != (1, 1)
        self._has_whole = bool(said.get("use_thumbnail", True))
        self._names_places = setting.processor.get("use_image_special_tokens", True)

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        height, width = pixels.shape[:2]
        size = self._fitted(height, width)
        tiles, rows, columns = [], 1, 1
        if self._splits and self._is_large(height, width):
            columns, rows = nearest_grid(
                height, width, self._least, self._most, (self._side, self._side)
            )
            side = self._side
            large = self._pixels.resized(pixels, rows * side, columns * side)
            tiles = [
                large[row * side : (row + 1) * side, column * side : (column + 1) * side]
                for row in range(rows)
                for column in range(columns)
            ]
        if not tiles or (self._has_whole and len(tiles) > 1):
            tiles.append(self._pixels.resized(pixels, *size))
        return self._prepared(tiles, rows, columns)

    def _prepared(self, tiles: list[Pixels], rows: int, columns: int) -> Prepared:
        patches = [self._patches(tile) for tile in tiles]
        most = max(map(len, patches))
        values = np.zeros((len(tiles), most, patches[0].shape[1]), dtype=np.float32)
        mask = np.zeros((len(tiles), most), dtype=np.int64)
        for index, own in enumerate(patches):
            values[index, : len(own)], mask[index, : len(own)] = own, 1
        shapes = np.array([self._shape(tile) for tile in tiles], dtype=np.int64)
        return Prepared(
            tensors={
                "pixel_values": values,
                "pixel_attention_mask": mask,
                "spatial_shapes": shapes,
            },
            replacement=self._text(rows, columns),
            counts=tuple(int(one) for one in shapes.prod(1) // self._merge**2),
        )

    def _text(self, rows: int, columns: int) -> str:
        token = self.tokens["image"]
        parts = []
        if rows * columns > 1:
            parts = [
                (f"<|img_row_{row + 1}_col_{column + 1}|>" if self._names_places else "") + token
                for row in range(rows)
                for column in range(columns)
            ]
            if self._has_whole:
                parts.append(("<|img_thumbnail|>" if self._names_places else "") + token)
        text = "".join(parts) or token
        return f"<|image_start|>{text}<|image_end|>" if self._names_places else text

    def _shape(self, tile: Pixels) -> tuple[int, int]:
        return tile.shape[0] // self._patch, tile.shape[1] // self._patch

    def _patches(self, tile: Pixels) -> Floats:
        """[rows * columns, patch * patch * 3]"""
        rows, columns = self._shape(tile)
        values = self._pixels.normalized(tile)
        split = values.reshape(rows, self._patch, columns, self._patch, 3).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(split).reshape(rows * columns, -1)

    def _is_large(self, height: int, width: int) -> bool:
        step = self._patch * self._merge
        tall, wide = (max(self._patch, round(side / step) * step) for side in (height, width))
        return tall * wide > self._area[1] * self._tolerance

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        step = self._patch * self._merge
        tall, wide = (max(step, round(side / step) * step) for side in (height, width))
        least, most = self._area
        if tall * wide > most:
            shrink = math.sqrt(height * width / most)
            tall, wide = (
                max(step, math.floor(side / shrink / step) * step) for side in (height, width)
            )
        elif tall * wide < least:
            grow = math.sqrt(least / (height * width))
            tall, wide = (math.ceil(side * grow / step) * step for side in (height, width))
        return tall, wide
