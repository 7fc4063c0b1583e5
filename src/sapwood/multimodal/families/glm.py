"""GLM-4.1V, 4.5V, 4.6V and GLM-OCR: Qwen2-VL's patches, with sizes that count two frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from sapwood.multimodal.families.qwen import Qwen2VL, area_of, fitted
from sapwood.multimodal.family import Clip, FamilySetting, Prepared
from sapwood.multimodal.image import Pixels

BEGIN, END = "<|begin_of_image|>", "<|end_of_image|>"


class Glm4V(Qwen2VL):
    """Of a video every two frames are a picture, after which their time stands."""

    image_area = (112 * 112, 28 * 28 * 15_000)
    video_area = (112 * 112, 28 * 28 * 2 * 30_000)

    def __init__(self, setting: FamilySetting) -> None:
        super().__init__(setting)
        # A vector of a video stands where one of a picture would.
        self.tokens["video"] = self.tokens["image"]
        self.markers["video"] = "<|video|>"

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        return self.of_size(
            pixels, self._fitted(pixels, self._frames, area_of(options, self._area))
        )

    def frames_of(self, total: int, fps: Fraction, options: Mapping[str, Any]) -> Sequence[int]:
        wanted = float(options.get("fps") or self._video.get("fps") or 2)
        longest = float(self._video.get("max_duration") or 300)
        rate, last = float(fps), total - 1
        seconds = total / rate
        if seconds <= longest:
            count = max(1, math.floor(seconds * wanted))
            found = [min(last, math.ceil(index * rate / wanted)) for index in range(count)]
        else:
            count = int(longest * wanted)
            if count >= total:
                return list(range(total))
            times = np.linspace(0, seconds, count)
            found = [min(last, math.ceil(time * rate)) for time in times.tolist()]
        return list(dict.fromkeys(found))

    def video(self, clip: Clip, options: Mapping[str, Any]) -> Prepared:
        patches, grid = self._of_frames(clip, options)
        num_rows = int(grid[0][0])
        firsts = list(clip.indices)[:: self._frames]
        parts = [
            f"{BEGIN}{self.tokens['image']}{END}{self.time(float(index / clip.fps))}"
            for index in firsts
        ]
        return Prepared(
            tensors={"pixel_values_videos": patches, "video_grid_thw": grid},
            replacement="".join(parts),
            counts=(patches.shape[0] // num_rows // self._merge**2,) * num_rows,
        )

    def time(self, seconds: float) -> str:
        return str(int(seconds))

    def _video_size(self, clip: Clip, area: tuple[int, int]) -> tuple[int, int]:
        count = len(clip.frames) + len(clip.frames) % 2
        return self._fitted(clip.frames[0], count, area)

    def _fitted(self, pixels: Pixels, count: int, area: tuple[int, int]) -> tuple[int, int]:
        height, width = pixels.shape[:2]
        factor = self._factor
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        return fitted(height, width, factor=factor, area=area, weight=count, rounded=count)


class Glm46V(Glm4V):
    """More frames of short videos."""

    def frames_of(self, total: int, fps: Fraction, options: Mapping[str, Any]) -> Sequence[int]:
        rate, seconds = float(fps), min(total / float(fps), 2400.0)
        wanted = 3 if seconds <= 30 else 1 if seconds <= 300 else 0.5
        count = min(int(seconds * wanted * self._frames), 640)
        found: list[int] = []
        if total >= count:
            next_s, step = 0.0, 1 / (self._frames * wanted)
            for index in range(total):
                if index * (1 / rate) >= next_s:  # rounded as transformers rounds it
                    next_s += step
                    found.append(index)
                    if next_s >= int(total / rate):
                        break
        if len(found) != count:
            start, end = (found[0], found[-1]) if 0 < len(found) < count else (0, total - 1)
            found = np.linspace(start, end, max(count, 1), dtype=int).tolist()
        return list(dict.fromkeys(found))

    def time(self, seconds: float) -> str:
        return f"{seconds:.1f} seconds"
