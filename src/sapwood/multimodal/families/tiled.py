"""Families that cut pictures into tiles as InternVL does, with other grids and other words between:
Aya Vision, Command A Vision, InternVL by its own names, and Llama 4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from sapwood.multimodal.families.constants import HALF
from sapwood.multimodal.families.internvl import InternVL
from sapwood.multimodal.family import FamilySetting, OnlyImages, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.resize import PixelSettings
from sapwood.schema.media_source import MediaKind

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _tokens_per_tile(setting: FamilySetting) -> int:
    tower = setting.model.get("vision_config") or {}
    side = int(tower.get("image_size", 512)) // int(tower.get("patch_size", 16))
    return (side // int(setting.model.get("downsample_factor", 2))) ** 2


class InternVLChat(InternVL):
    """Its files say nothing of tiles where they come with the model's own code; the model's
    config.json does."""

    def __init__(self, setting: FamilySetting) -> None:
        model = setting.model
        tower = model.get("vision_config") or {}
        side = int(model.get("force_image_size") or tower.get("image_size") or 448)
        own = {
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            **setting.image,
            "crop_to_patches": bool(model.get("dynamic_image_size", True)),
            "min_patches": int(model.get("min_dynamic_patch", 1)),
            "max_patches": int(model.get("max_dynamic_patch", 12)),
            "size": {"height": side, "width": side},
        }
        ratio = float(model.get("downsample_ratio", 0.5))
        length = int((side // int(tower.get("patch_size", 14)) * ratio) ** 2)
        super().__init__(
            FamilySetting(
                model_type=setting.model_type,
                image=own,
                processor={"image_seq_length": length},
                model=model,
                tokens=setting.tokens,
            )
        )
        self.markers: dict[MediaKind, str] = {"image": "<image>"}


class AyaVision(InternVL):
    """Tiles are numbered; the whole picture comes last."""

    def __init__(self, setting: FamilySetting) -> None:
        super().__init__(setting)
        self.tokens = {"image": setting.tokens.get("image", "<|IMG_PATCH|>")}
        self.markers = {"image": str(setting.processor.get("image_token") or "<image>")}
        self._length = _tokens_per_tile(setting)

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        tiles = self.cut(pixels, options)
        token, count = self.tokens["image"], len(tiles)
        parts = [f"TILE_{index}{token}" for index in range(1, count)]
        text = "".join(parts) + f"TILE_GLOBAL{token}"
        return Prepared(
            tensors={"pixel_values": np.stack([self._pixels.channels_first(t) for t in tiles])},
            replacement=f"<|START_OF_IMG|>{text}<|END_OF_IMG|>",
            counts=(self._length,) * count,
        )


class Cohere2Vision(InternVL):
    """The grid that enlarges a picture least, or else shrinks it least; each tile ends a line."""

    def __init__(self, setting: FamilySetting) -> None:
        image = {"size": {"height": 512, "width": 512}, "crop_to_patches": True, **setting.image}
        super().__init__(
            FamilySetting(
                model_type=setting.model_type,
                image=image,
                processor=setting.processor,
                model=setting.model,
                tokens=setting.tokens,
            )
        )
        self.tokens = {"image": setting.tokens.get("image", "<|IMG_PATCH|>")}
        self.markers = self.tokens
        self._length = _tokens_per_tile(setting)

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        tiles = self.cut(pixels, options)
        line = f"{self.tokens['image']}<|IMG_LINE_BREAK|>"
        return Prepared(
            tensors={"pixel_values": np.stack([self._pixels.channels_first(t) for t in tiles])},
            replacement=f"<|START_OF_IMG|>{line * len(tiles)}<|END_OF_IMG|>",
            counts=(self._length,) * len(tiles),
        )

    def _grid(self, height: int, width: int, least: int, most: int) -> tuple[int, int]:
        grids = sorted(
            (
                (columns, rows)
                for columns in range(1, most + 1)
                for rows in range(1, most + 1)
                if columns * rows <= most
            ),
            key=lambda grid: grid[0] * grid[1],
        )

        def scale(grid: tuple[int, int]) -> float:
            return float(min(grid[0] * self._height / width, grid[1] * self._height / height))

        enlarging = [grid for grid in grids if scale(grid) >= 1]
        return min(enlarging, key=scale) if enlarging else max(grids, key=scale)


class Llama4(OnlyImages):
    """A picture is fitted into a grid of tiles and filled up with black; the whole comes last."""

    def __init__(self, setting: FamilySetting) -> None:
        self.tokens: dict[MediaKind, str] = {"image": setting.tokens.get("image", "<|patch|>")}
        self.markers: dict[MediaKind, str] = {"image": "<|image|>"}
        settings = setting.image
        self._pixels = PixelSettings.of(
            settings, mean=HALF, std=HALF, resample=Image.Resampling.BILINEAR
        )
        tower = setting.model.get("vision_config") or {}
        self._side = int((settings.get("size") or {}).get("height", 336))
        self._most = int(settings.get("max_patches", 16))
        self._enlarges = bool(settings.get("resize_to_max_canvas", False))
        ratio = float(tower.get("pixel_shuffle_ratio", 0.5))
        self._length = int((self._side // int(tower.get("patch_size", 14)) * ratio) ** 2)

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        side = self._side
        height, width = pixels.shape[:2]
        rows, columns = self._grid(height, width)
        frame = np.zeros((rows * side, columns * side, 3), dtype=np.uint8)
        fitted = self._pixels.resized(pixels, *self._inside(height, width, rows, columns))
        frame[: fitted.shape[0], : fitted.shape[1]] = fitted
        tiles = [
            frame[row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
        token, text = self.tokens["image"], ""
        if len(tiles) > 1:
            tiles.append(self._pixels.resized(pixels, side, side))
            line = "<|tile_x_separator|>".join([token] * columns)
            text = f"{line}<|tile_y_separator|>" * rows
        return Prepared(
            tensors={"pixel_values": np.stack([self._pixels.channels_first(t) for t in tiles])},
            replacement=f"<|image_start|>{text}<|image|>{token}<|image_end|>",
            counts=(self._length,) * len(tiles),
        )

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) into which a picture fits with the least enlargement, or else with the
        least shrinking; of equal ones the smallest."""
        grids = [
            (rows, count // rows)
            for count in range(self._most, 0, -1)
            for rows in range(1, count + 1)
            if count % rows == 0
        ]

        def scale(grid: tuple[int, int]) -> float:
            tall, wide = (np.float32(one * self._side) for one in grid)
            return float(min(wide / np.float32(width), tall / np.float32(height)))

        enlarging = [scale(grid) for grid in grids if scale(grid) >= 1]
        if enlarging:
            best = max(enlarging) if self._enlarges else min(enlarging)
        else:
            best = max(scale(grid) for grid in grids)
        return min(
            (grid for grid in grids if scale(grid) == best), key=lambda grid: grid[0] * grid[1]
        )

    def _inside(self, height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
        """The size of the picture in its grid; small pictures are enlarged to one tile at most."""
        tall, wide = rows * self._side, columns * self._side
        if not self._enlarges:
            tall = min(max(height, self._side), tall)
            wide = min(max(width, self._side), wide)
        if wide / width < tall / height:
            tall = min(math.floor(height * (wide / width)), tall)
        else:
            wide = min(math.floor(width * (tall / height)), wide)
        return max(tall, 1), max(wide, 1)
