"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: any size, in patches that are merged 2 x 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from sapwood.base.errors import InvalidRequest
from sapwood.multimodal.families.constants import CLIP_MEAN, CLIP_STD, HALF
from sapwood.multimodal.family import Clip, FamilySetting, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.resize import Floats, PixelSettings
from sapwood.schema.media_source import MediaKind

MAX_ASPECT = 200


class Qwen2VL:
    """Of a video every two frames are one row of patches."""

    mean, std = CLIP_MEAN, CLIP_STD
    default_patch = 14
    image_area = (56 * 56, 28 * 28 * 1280)
    video_area = (128 * 28 * 28, 28 * 28 * 768)

    def __init__(self, setting: FamilySetting) -> None:
        self.tokens: dict[MediaKind, str] = {
            "image": setting.tokens.get("image", "<|image_pad|>"),
            "video": setting.tokens.get("video", "<|video_pad|>"),
        }
        self.markers: dict[MediaKind, str] = dict(self.tokens)
        image = setting.image
        # Qwen2-VL's repositories have one file for both.
        video = setting.video or image
        self._pixels = PixelSettings.of(image, mean=self.mean, std=self.std)
        self._video_pixels = PixelSettings.of(video, mean=self.mean, std=self.std)
        self._area = area_of(image, self.image_area)
        self._video_area = area_of(setting.video, self.video_area)
        self._video = video
        self._patch = image.get("patch_size", self.default_patch)
        self._merge = image.get("merge_size", 2)
        self._frames = image.get("temporal_patch_size", 2)

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        area = area_of(options, self._area)
        size = fitted(*pixels.shape[:2], factor=self._factor, area=area)
        return self.of_size(pixels, size)

    def of_size(self, pixels: Pixels, size: tuple[int, int]) -> Prepared:
        """A picture that is to have that height and width."""
        height, width = size
        frame = self._pixels.normalized(self._pixels.resized(pixels, height, width))
        patches = self._patches(np.stack([frame] * self._frames))
        grid = np.array([[1, height // self._patch, width // self._patch]], dtype=np.int64)
        token = self.tokens["image"]
        return Prepared(
            tensors={"pixel_values": patches, "image_grid_thw": grid},
            replacement=token,
            counts=(patches.shape[0] // self._merge**2,),
        )

    def frames_of(self, total: int, fps: Fraction, options: Mapping[str, Any]) -> Sequence[int]:
        least, most = self._video.get("min_frames", 4), self._video.get("max_frames", 768)
        step = self._frames
        num_frames = options.get("num_frames") or self._video.get("num_frames")
        if num_frames is not None:
            count = round(num_frames / step) * step
        else:
            wanted = float(options.get("fps") or self._video.get("fps") or 2)
            most = math.floor(min(most, total) / step) * step
            asked = total / float(fps) * wanted
            count = math.floor(min(max(asked, least), most, total) / step) * step
        count = max(1, min(count, total))
        return [int(index * total / count) for index in range(count)]

    def video(self, clip: Clip, options: Mapping[str, Any]) -> Prepared:
        patches, grid = self._of_frames(clip, options)
        rate = float(clip.fps) * len(clip.frames) / clip.total
        token = self.tokens["video"]
        return Prepared(
            tensors={
                "pixel_values_videos": patches,
                "video_grid_thw": grid,
                "second_per_grid_ts": np.array([self._frames / rate], dtype=np.float32),
            },
            replacement=token,
            counts=(patches.shape[0] // self._merge**2,),
        )

    def _of_frames(self, clip: Clip, options: Mapping[str, Any]) -> tuple[Floats, Any]:
        height, width = self._video_size(clip, area_of(options, self._video_area))
        frames = [
            self._video_pixels.normalized(self._video_pixels.resized(frame, height, width))
            for frame in clip.frames
        ]
        frames += [frames[-1]] * (-len(frames) % self._frames)
        grid = (len(frames) // self._frames, height // self._patch, width // self._patch)
        return self._patches(np.stack(frames)), np.array([grid], dtype=np.int64)

    def _video_size(self, clip: Clip, area: tuple[int, int]) -> tuple[int, int]:
        return fitted(*clip.frames[0].shape[:2], factor=self._factor, area=area)

    @property
    def _factor(self) -> int:
        return int(self._patch * self._merge)

    def _patches(self, frames: Floats) -> Floats:
        """frames [num_frames, height, width, 3] -> [num_patches, 3 * frames * patch * patch], the
        patches that are merged next to each other."""
        num_frames, height, width, channels = frames.shape
        step, patch, merge = self._frames, self._patch, self._merge
        rows, columns = height // patch, width // patch
        split = frames.reshape(
            num_frames // step, step, rows // merge, merge, patch, columns // merge, merge, patch, 3
        )
        ordered = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        num_patches = num_frames // step * rows * columns
        return np.ascontiguousarray(ordered).reshape(num_patches, channels * step * patch * patch)


class PaddleOcr(Qwen2VL):
    """PaddleOCR-VL: patches of one frame, row by row, each a square of pixels; no videos."""

    image_area = (384 * 384, 1536 * 1536)

    def __init__(self, setting: FamilySetting) -> None:
        super().__init__(setting)
        self._frames = 1
        for of_kind in (self.tokens, self.markers):
            of_kind.pop("video")

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        height, width = pixels.shape[:2]
        factor = self._factor
        if height < factor:
            height, width = factor, round(width * factor / height)
        if width < factor:
            height, width = round(height * factor / width), factor
        area = area_of(options, self._area)
        return self.of_size(pixels, fitted(height, width, factor=factor, area=area))

    def _patches(self, frames: Floats) -> Floats:
        _, height, width, _ = frames.shape
        patch = self._patch
        split = frames[0].reshape(height // patch, patch, width // patch, patch, 3)
        ordered = np.ascontiguousarray(split.transpose(0, 2, 4, 1, 3))
        return ordered.reshape(-1, 3, patch, patch)


class Qwen3VL(Qwen2VL):
    """A video is a row of pictures of two frames, each after its time in words."""

    mean, std = HALF, HALF
    default_patch = 16
    image_area = (56 * 56, 28 * 28 * 1280)
    video_area = (128 * 32 * 32, 32 * 32 * 768)

    def __init__(self, setting: FamilySetting) -> None:
        super().__init__(setting)
        self.markers["video"] = f"<|vision_start|>{self.tokens['video']}<|vision_end|>"

    def frames_of(self, total: int, fps: Fraction, options: Mapping[str, Any]) -> Sequence[int]:
        least, most = self._video.get("min_frames", 4), self._video.get("max_frames", 768)
        count = options.get("num_frames") or self._video.get("num_frames")
        if count is None:
            wanted = float(options.get("fps") or self._video.get("fps") or 2)
            count = min(max(int(total / float(fps) * wanted), least), most, total)
        count = max(1, min(int(count), total))
        return [int(index) for index in np.linspace(0, total - 1, count).round().astype(int)]

    def video(self, clip: Clip, options: Mapping[str, Any]) -> Prepared:
        patches, grid = self._of_frames(clip, options)
        num_rows = int(grid[0][0])
        token = self.tokens["video"]
        times = self._times(clip)
        parts = [f"<{each:.1f} seconds><|vision_start|>{token}<|vision_end|>" for each in times]
        count = patches.shape[0] // num_rows // self._merge**2
        return Prepared(
            tensors={"pixel_values_videos": patches, "video_grid_thw": grid},
            replacement="".join(parts),
            counts=(count,) * num_rows,
        )

    def _video_size(self, clip: Clip, area: tuple[int, int]) -> tuple[int, int]:
        height, width = clip.frames[0].shape[:2]
        factor, count = self._factor, len(clip.frames)
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        # The area counts for all frames together.
        rounded = round(count / self._frames) * self._frames
        return fitted(height, width, factor=factor, area=area, weight=count, rounded=rounded)

    def _times(self, clip: Clip) -> list[float]:
        indices = list(clip.indices)
        indices += [indices[-1]] * (-len(indices) % self._frames)
        seconds = [float(index / clip.fps) for index in indices]
        step = self._frames
        return [(seconds[at] + seconds[at + step - 1]) / 2 for at in range(0, len(seconds), step)]


def fitted(
    height: int,
    width: int,
    *,
    factor: int,
    area: tuple[int, int],
    weight: int = 1,
    rounded: int = 1,
) -> tuple[int, int]:
    """The size nearest to (height, width) whose sides are multiples of `factor` and whose area,
    times the number of frames, lies in `area`; the proportions stay as far as that allows.

    weight, rounded  number of frames, as it is and rounded to what the tower takes
    Source           Wang et al. 2024, arXiv:2409.12191, section 2.1
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise InvalidRequest(
            f"has {width} x {height} pixels, but one side must not be more than {MAX_ASPECT} times "
            "the other for this model"
        )
    least, most = area
    tall = round(height / factor) * factor
    wide = round(width / factor) * factor
    if rounded * tall * wide > most:
        shrink = math.sqrt(weight * height * width / most)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif rounded * tall * wide < least:
        grow = math.sqrt(least / (weight * height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


def area_of(settings: Mapping[str, Any], otherwise: tuple[int, int]) -> tuple[int, int]:
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or otherwise[0]
    most = settings.get("max_pixels") or size.get("longest_edge") or otherwise[1]
    return int(least), int(most)
