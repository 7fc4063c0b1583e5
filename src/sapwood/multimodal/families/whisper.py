"""Preparing of sounds for Whisper: a log mel spectrum of 30 s, filled up with silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapwood.base.errors import UnsupportedFeature
from sapwood.multimodal.family import Clip, FamilySetting, Prepared
from sapwood.multimodal.image import Pixels
from sapwood.multimodal.mel import HOP, log_mel
from sapwood.schema.media_source import MediaKind

FULL_SCALE = 32_768.0
"""By which 16-bit samples are divided."""


class Whisper:
    """Hears one sound per request; its decoder attends to it, so no token stands for a vector."""

    markers: Mapping[MediaKind, str] = {}
    tokens: Mapping[MediaKind, str] = {}

    def __init__(self, setting: FamilySetting) -> None:
        model = setting.model
        self._num_bins = int(model.get("num_mel_bins", 80))
        self._num_frames = 2 * int(model.get("max_source_positions", 1500))

    @property
    def longest(self) -> int:
        """Samples of a sound at most."""
        return self._num_frames * HOP

    def audio(self, samples: NDArray[np.int16]) -> Prepared:
        """samples [n] at mel.RATE, at most `longest`"""
        whole = np.zeros(self.longest, dtype=np.float32)
        whole[: len(samples)] = samples[: self.longest] / FULL_SCALE
        features = log_mel(whole, self._num_bins)
        return Prepared(tensors={"input_features": features}, replacement="", counts=())

    def image(self, pixels: Pixels, options: Mapping[str, Any]) -> Prepared:
        raise UnsupportedFeature("is a picture, but this model takes only sounds")

    def frames_of(self, total: int, fps: Fraction, options: Mapping[str, Any]) -> Sequence[int]:
        raise UnsupportedFeature("is a video, but this model takes only sounds")

    def video(self, clip: Clip, options: Mapping[str, Any]) -> Prepared:
        raise UnsupportedFeature("is a video, but this model takes only sounds")
