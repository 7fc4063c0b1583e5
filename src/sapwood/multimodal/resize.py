"""Resizing and normalising, equal within one grey level to what transformers' processors do.

torchvision's antialiased resizing of 8-bit pixels uses the same filters as Pillow, with weights
that are rounded a little more; so Pillow does it here, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sapwood.multimodal.image import Pixels

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelSettings:
    """The part of a preprocessor_config.json that all families have."""

    resample: Image.Resampling
    scale: float
    mean: Floats
    std: Floats

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> PixelSettings:
        """mean, std, resample: what the family has where the file says nothing"""
        normalizes = settings.get("do_normalize", True)
        return cls(
            resample=Image.Resampling(settings.get("resample", resample)),
            scale=settings.get("rescale_factor", 1 / 255)
            if settings.get("do_rescale", True)
            else 1,
            mean=_row(settings.get("image_mean") or mean) if normalizes else _row((0, 0, 0)),
            std=_row(settings.get("image_std") or std) if normalizes else _row((1, 1, 1)),
        )

    def resized(self, pixels: Pixels, height: int, width: int) -> Pixels:
        return resized(pixels, height, width, self.resample)

    def normalized(self, pixels: Pixels) -> Floats:
        """[height, width, 3] of 8 bits -> the same in float32, as the tower expects it."""
        # One pass: pixels * scale - mean, over std.
        weight = np.asarray(self.scale / self.std, dtype=np.float32)
        values: Floats = (pixels.astype(np.float32) - self.mean / self.scale) * weight
        return values

    def channels_first(self, pixels: Pixels) -> Floats:
        return np.ascontiguousarray(self.normalized(pixels).transpose(2, 0, 1))


def resized(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), resample))


def centre_crop(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """The middle of the picture; where it is smaller, black is added around it."""
    rows, columns = pixels.shape[:2]
    if rows < height or columns < width:
        tall, wide = max(rows, height), max(columns, width)
        top, left = -(-(tall - rows) // 2), -(-(wide - columns) // 2)
        frame = np.zeros((tall, wide, pixels.shape[2]), dtype=pixels.dtype)
        frame[top : top + rows, left : left + columns] = pixels
        pixels, rows, columns = frame, tall, wide
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[top : top + height, left : left + width]


def _row(values: Sequence[float]) -> Floats:
    return np.asarray(values, dtype=np.float32)
