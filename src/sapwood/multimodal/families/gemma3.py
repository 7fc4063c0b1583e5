"""Gemma 3: every picture becomes one square of 256 vectors; long ones also crops, if asked."""

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

BEGIN, END = "<start_of_image>", "<end_of_image>"


class Gemma3(OnlyImages):
    def __init__(self, setting: FamilySetting) -> None:
        self.tokens: dict[MediaKind, str] = {
            "image": setting.tokens.get("image", "<image_soft_token>")
        }
        self.markers: dict[MediaKind, str] = {"image": BEGIN}
        settings = setting.image
        self._pixels = PixelSettings.of(
            settings, mean=HALF, std=HALF, resample=Image.Resampling.BILINEAR
        )
        size = settings.get("size") or {"height": 896, "width": 896}
        self._height, self._width = size["height"], size["width"]
        self._pans = bool(settings.get("do_pan_and_scan"))
        self._least = settings.get("pan_and_scan_min_crop_size") or 256
        self._most = settings.get("pan_and_scan_max_num_crops") or 4
        self._ratio = settings.get("pan_and_scan_min_ratio_to_activate") or 1.2
        self._length = (
            setting.processor.get("image_seq_length")
            or setting.model.get("mm_tokens_per_image")
            or 256
        )

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        crops = self._crops(pixels) if self._pans else []
        squares = [
            self._pixels.channels_first(self._pixels.resized(each, self._height, self._width))
            for each in (pixels, *crops)
        ]
        one = f"\n\n{BEGIN}{self.tokens['image']}{END}\n\n"
        text = one
        if crops:
            others = " ".join([one] * len(crops))
            text = (
                f"Here is the original image {one} and here are some crops to help you see better "
                f"{others}"
            )
        return Prepared(
            tensors={"pixel_values": np.stack(squares)},
            replacement=text,
            counts=(self._length,) * len(squares),
        )

    def _crops(self, pixels: Pixels) -> list[Pixels]:
        """Pan and scan: parts of a long picture along its long side."""
        height, width = pixels.shape[:2]
        long, short = max(height, width), min(height, width)
        if long / short < self._ratio:
            return []
        count = min(math.floor(long / self._least), math.floor(long / short + 0.5))
        count = min(self._most, max(2, count))
        step = math.ceil(long / count)
        if min(step, short) < self._least:
            return []
        starts = [step * index for index in range(count)]
        if width >= height:
            return [pixels[:, start : start + step] for start in starts]
        return [pixels[start : start + step] for start in starts]
