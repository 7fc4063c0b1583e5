"""Frames as files: mp4 (H.264), webm (VP9), an animated GIF, or a zip of pictures."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from sapwood.base.errors import UnsupportedFeature
from sapwood.schema.painting import Picture

if TYPE_CHECKING:
    from av.container import OutputContainer

VIDEO_TYPES = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "gif": "image/gif",
    "frames": "application/zip",
}
SUFFIXES = {"mp4": "mp4", "webm": "webm", "gif": "gif", "frames": "zip"}
"""By format: the ending of a file's name."""
_CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "mp4": ("libx264", {"crf": "17"}),
    "webm": ("libvpx-vp9", {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "5"}),
}
_SHEET_COLUMNS = 5


def encoded_video(video: Picture, output_format: str, fps: int) -> bytes:
    """The frames as a file. UnsupportedFeature if the package that writes videos is missing."""
    file = io.BytesIO()
    if output_format == "gif":
        first, *others = frames_of(video)
        first.save(
            file,
            "GIF",
            save_all=True,
            append_images=others,
            duration=max(round(1000 / fps), 20),
            loop=0,
        )
    elif output_format == "frames":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for place, frame in enumerate(frames_of(video)):
                own = io.BytesIO()
                frame.save(own, "PNG")
                archive.writestr(f"{place:05}.png", own.getvalue())
    else:
        _write_stream(file, video, output_format, fps)
    return file.getvalue()


def frames_of(video: Picture) -> Iterator[Image.Image]:
    mode = "RGBA" if video.channels == 4 else "RGB"
    size = video.width * video.height * video.channels
    for place in range(video.num_frames):
        raw = video.pixels[place * size : (place + 1) * size]
        yield Image.frombytes(mode, (video.width, video.height), raw)


def thumbnail(video: Picture) -> bytes:
    """The first frame as WebP."""
    file = io.BytesIO()
    next(frames_of(video)).save(file, "WEBP")
    return file.getvalue()


def spritesheet(video: Picture) -> bytes:
    """At most 25 frames, evenly taken, side by side as JPEG."""
    frames = list(frames_of(video))
    taken = frames[:: max(1, -(-len(frames) // _SHEET_COLUMNS**2))]
    columns = min(_SHEET_COLUMNS, len(taken))
    rows = -(-len(taken) // columns)
    sheet = Image.new("RGB", (columns * video.width, rows * video.height))
    for place, frame in enumerate(taken):
        at = (place % columns * video.width, place // columns * video.height)
        sheet.paste(frame, at)
    sheet.thumbnail((2048, 2048))
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=85)
    return file.getvalue()


def require_writer(output_format: str) -> None:
    """UnsupportedFeature if the package that writes these files is not installed."""
    if output_format in _CODECS:
        _av()


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise UnsupportedFeature(
            "mp4 and webm are written by PyAV, which is not installed here; ask for the "
            "output_format gif or frames, or install it: pip install 'sapwood[media]'",
            param="output_format",
        ) from None
    return av


def _write_stream(file: io.BytesIO, video: Picture, output_format: str, fps: int) -> None:
    av = _av()
    codec, options = _CODECS[output_format]
    container: OutputContainer
    with av.open(file, mode="w", format=output_format) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        # Half as many numbers of colour: sides must be even.
        stream.width, stream.height = video.width // 2 * 2, video.height // 2 * 2
        stream.pix_fmt = "yuv420p"
        for image in frames_of(video):
            frame = av.VideoFrame.from_image(image.convert("RGB").crop((0, 0, *_even(video))))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _even(video: Picture) -> tuple[int, int]:
    return video.width // 2 * 2, video.height // 2 * 2
