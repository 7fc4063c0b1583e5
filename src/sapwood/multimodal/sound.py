"""A sound's file -> samples, and where a long one may be cut. PyAV decodes."""

from __future__ import annotations

import io

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.error import FFmpegError
from numpy.typing import NDArray

from sapwood.base.errors import InvalidRequest
from sapwood.multimodal.mel import RATE

Samples = NDArray[np.int16]

FORMATS = frozenset(
    {"wav", "mp3", "flac", "ogg", "mov", "mp4", "matroska", "webm", "aac", "aiff", "amr", "w64"}
    | {"ac3", "au", "caf", "avi", "mpegts", "mpeg", "flv", "m4a", "3gp"}
)
"""Containers that hold their own samples. Others of FFmpeg's are lists of further files and URLs,
which it would read from this machine (HLS, concat)."""

_FRAME = RATE // 50
"""Samples of which the loudness is one number: 20 ms."""
_GAP = 10
"""Such frames that a gap between words has: 0.2 s."""


def samples_of(data: bytes, *, max_seconds: float) -> Samples:
    """[n] of one channel at RATE.

    Raises InvalidRequest if it has no sound, too long a one, or is damaged."""
    most = int(max_seconds * RATE)
    try:
        return _decoded(data, most)
    except FFmpegError as error:
        raise InvalidRequest(
            f"cannot be decoded; send wav, mp3, flac, ogg, m4a, mp4 or webm ({error})"[:300]
        ) from None
    except (ValueError, EOFError, IndexError) as error:
        raise InvalidRequest(f"cannot be decoded: {error}"[:300]) from None


def _decoded(data: bytes, most: int) -> Samples:
    pieces: list[Samples] = []
    count = 0
    resampler = AudioResampler(format="s16", layout="mono", rate=RATE)
    options = {"format_whitelist": ",".join(sorted(FORMATS)), "protocol_whitelist": "none"}
    with av.open(
        io.BytesIO(data), mode="r", metadata_errors="ignore", container_options=options
    ) as container:
        if not container.streams.audio:
            raise InvalidRequest("has no sound")
        stream = container.streams.audio[0]
        for frame in container.decode(stream):
            frame.pts = None  # damaged times would make the resampler fill gaps
            for piece in resampler.resample(frame):
                pieces.append(piece.to_ndarray().reshape(-1).astype(np.int16))
                count += len(pieces[-1])
            if count > most:
                raise InvalidRequest(
                    f"is longer than {most / RATE:g} s, as long as this server takes; cut it, or "
                    "start the server with a larger --max-audio-seconds"
                )
    for piece in resampler.resample(None):
        pieces.append(piece.to_ndarray().reshape(-1).astype(np.int16))
    if not count:
        raise InvalidRequest("has no sound")
    return np.concatenate(pieces)


def cuts_of(samples: Samples, *, longest: int, shortest: int) -> list[tuple[int, int]]:
    """(start, end) of pieces of a sound, none of which has more than `longest` samples. A piece
    that is not the last ends in the quietest gap after its first `shortest` samples."""
    cuts: list[tuple[int, int]] = []
    start = 0
    while len(samples) - start > longest:
        cut = start + shortest + _quietest(samples[start + shortest : start + longest])
        cuts.append((start, cut))
        start = cut
    cuts.append((start, len(samples)))
    return cuts


def _quietest(samples: Samples) -> int:
    """The middle of the quietest gap; of equally quiet ones the last, so that pieces are long."""
    count = len(samples) // _FRAME
    if count <= _GAP:
        return len(samples)
    frames = samples[: count * _FRAME].reshape(count, _FRAME).astype(np.float32)
    loudness = np.convolve((frames * frames).mean(axis=1), np.ones(_GAP), mode="valid")
    last = len(loudness) - 1 - int(np.argmin(loudness[::-1]))
    return (last + _GAP // 2) * _FRAME
