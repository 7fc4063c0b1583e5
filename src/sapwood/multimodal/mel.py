"""Log mel spectra of sounds, as Whisper hears them.

Source: Radford et al. 2022, arXiv:2212.04356, section 2.2; Slaney 1998, Auditory Toolbox, for the
scale; the numbers are those of OpenAI's published filters."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
"""Samples per second."""
WINDOW, HOP = 400, 160
"""Samples of a frame, and from one frame to the next: 25 and 10 ms."""

Floats = NDArray[np.float64]

_LINEAR_HZ = 200.0 / 3
_BREAK_HZ = 1000.0
_LOG_STEP = np.log(6.4) / 27.0


def log_mel(samples: NDArray[np.floating], num_bins: int) -> NDArray[np.float32]:
    """samples [n] in -1 .. 1, at RATE -> [num_bins, n // HOP]"""
    padded = np.pad(samples.astype(np.float64), WINDOW // 2, mode="reflect")
    count = len(samples) // HOP
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:count]
    power = np.abs(np.fft.rfft(frames * _hann(), axis=1)) ** 2
    found = np.log10(np.maximum(power @ filters(num_bins), 1e-10)).T
    found = np.maximum(found, found.max() - 8.0)
    return np.ascontiguousarray((found + 4.0) / 4.0, dtype=np.float32)


@lru_cache(maxsize=1)
def _hann() -> Floats:
    return np.hanning(WINDOW + 1)[:-1]


@lru_cache(maxsize=4)
def filters(num_bins: int) -> Floats:
    """[frequencies of a frame, num_bins]: triangles of equal area on the mel scale."""
    edges = _hertz(np.linspace(0.0, _mel(RATE / 2), num_bins + 2))
    frequencies = np.linspace(0.0, RATE / 2, WINDOW // 2 + 1)
    rising = (frequencies[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies[:, None]) / np.diff(edges)[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return np.asarray(triangles * (2.0 / (edges[2:] - edges[:-2])), dtype=np.float64)


def _mel(hertz: float) -> float:
    if hertz < _BREAK_HZ:
        return hertz / _LINEAR_HZ
    return float(_BREAK_HZ / _LINEAR_HZ + np.log(hertz / _BREAK_HZ) / _LOG_STEP)


def _hertz(mels: Floats) -> Floats:
    start = _BREAK_HZ / _LINEAR_HZ
    above = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mels, start) - start))
    return np.where(mels < start, mels * _LINEAR_HZ, above)
