"""A video's file -> the frames that its model should see. PyAV decodes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError

from sapwood.base.errors import InvalidRequest
from sapwood.multimodal.family import Clip
from sapwood.multimodal.image import Pixels, check_size

Choose = Callable[[int, Fraction], Sequence[int]]
"""(frames of the video, frames per second) -> the positions of those that are wanted"""

FORMATS = frozenset(
    {"mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "gif", "ogg", "flv"}
)
"""Containers that hold their own frames. Others of FFmpeg's are lists of further files and URLs,
which it would read from this machine (HLS, concat)."""


def clip_of(data: bytes, choose: Choose, *, max_pixels: int, max_frames: int) -> Clip:
    """The chosen frames. All frames up to the last chosen one are decoded, and only these are kept.

    Raises InvalidRequest if it is no video, has too many or too large frames, or is cut off before
    the last chosen frame.
    """
    try:
        total, fps = _measured(data, max_pixels=max_pixels, max_frames=max_frames)
        wanted = list(choose(total, fps))
        frames = _decoded(data, wanted)
    except FFmpegError as error:
        raise InvalidRequest(f"cannot be decoded: {error}"[:300]) from None
    except (ValueError, EOFError, IndexError) as error:
        raise InvalidRequest(f"cannot be decoded: {error}"[:300]) from None
    return Clip(frames=frames, indices=wanted, total=total, fps=fps)


def of_frames(frames: Sequence[Pixels], fps: Fraction) -> Clip:
    """Of frames that the client has chosen: all of them."""
    if any(frame.shape != frames[0].shape for frame in frames):
        raise InvalidRequest("has frames of different sizes")
    return Clip(frames=frames, indices=range(len(frames)), total=len(frames), fps=fps)


def _measured(data: bytes, *, max_pixels: int, max_frames: int) -> tuple[int, Fraction]:
    with _opened(data) as container:
        stream = container.streams.video[0]
        check_size(stream.width, stream.height, max_pixels)
        fps = stream.average_rate or stream.guessed_rate or Fraction(24)
        # What the header claims is not believed: packets are counted, which decodes nothing.
        total = 0
        for packet in container.demux(stream):
            total += packet.size > 0
            if total > max_frames:
                raise InvalidRequest(
                    f"has more than {max_frames} frames, as many as this server takes; shorten it"
                )
    if total < 1 or fps <= 0:
        raise InvalidRequest("is a video without frames")
    return total, Fraction(fps)


def _decoded(data: bytes, wanted: Sequence[int]) -> list[Pixels]:
    positions = set(wanted)
    found: dict[int, Pixels] = {}
    with _opened(data) as container:
        stream = container.streams.video[0]
        size = (stream.width, stream.height)
        for position, frame in enumerate(container.decode(stream)):
            if position in positions:
                found[position] = frame.to_ndarray(
                    format="rgb24", width=size[0], height=size[1]
                ).astype(np.uint8, copy=False)
            if len(found) == len(positions):
                break
    missing = positions - found.keys()
    # The last packets of some files hold no frame of their own.
    if not found or len(missing) > max(2, len(positions) // 10):
        raise InvalidRequest("is cut off: its last frames are missing")
    last = found[max(found)]
    return [found.get(position, last) for position in wanted]


def _opened(data: bytes) -> av.container.InputContainer:
    container = av.open(
        io.BytesIO(data),
        mode="r",
        metadata_errors="ignore",
        container_options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"},
    )
    if not container.streams.video:
        container.close()
        raise InvalidRequest("is a file without a video in it")
    return container
