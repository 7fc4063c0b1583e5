"""Pictures as files, and files as pictures; what a client sends is hostile."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from sapwood.base.errors import InvalidRequest
from sapwood.schema.painting import InputPicture, Picture

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_FORMATS = ("PNG", "JPEG", "WEBP")
_QUALITY = 95
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def encoded(picture: Picture, output_format: str, compression: int | None = None) -> bytes:
    """The picture as a file; compression: quality of jpeg and webp, 0 to 100."""
    mode = "RGBA" if picture.channels == 4 else "RGB"
    image = Image.frombytes(mode, (picture.width, picture.height), picture.pixels)
    if output_format == "jpeg" and mode == "RGBA":
        image = image.convert("RGB")
    file = io.BytesIO()
    if output_format == "png":
        image.save(file, "PNG")
    else:
        quality = _QUALITY if compression is None else compression
        image.save(file, output_format.upper(), quality=quality)
    return file.getvalue()


def decoded(raw: bytes, name: str, *, max_pixels: int) -> InputPicture:
    """A picture that a request brings. InvalidRequest for what is none, or too large."""
    image = _opened(raw, name, max_pixels)
    with _named(name):
        image = ImageOps.exif_transpose(image).convert("RGB")
    return InputPicture(width=image.width, height=image.height, pixels=image.tobytes())


def decoded_mask(raw: bytes, name: str, size: tuple[int, int], *, max_pixels: int) -> bytes:
    """255 where the picture is to be drawn anew: where the mask lets see through it, as OpenAI has
    it; a mask without opacity: where it is white. size: (width, height) of the picture"""
    image = _opened(raw, name, max_pixels)
    with _named(name):
        if image.size != size:
            raise InvalidRequest(
                f"{name} has {image.width}x{image.height} pixels, but the picture has "
                f"{size[0]}x{size[1]}; send one of the same size",
                param=name,
            )
        if "A" in image.getbands():
            return ImageOps.invert(image.getchannel("A")).tobytes()
        return image.convert("L").tobytes()


def _opened(raw: bytes, name: str, max_pixels: int) -> Image.Image:
    with _named(name):
        image = Image.open(io.BytesIO(raw), formats=_FORMATS)
        # Only the header has been read so far.
        if image.width * image.height > max_pixels:
            raise InvalidRequest(
                f"{name} has {image.width}x{image.height} pixels, but at most {max_pixels} are "
                "accepted; make it smaller, or start the server with a larger "
                "--max-picture-pixels",
                param=name,
            )
        image.load()
        return image


class _named:  # noqa: N801 - reads as a statement
    """Errors of a file that is no picture become an InvalidRequest that names it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _BROKEN):
            raise InvalidRequest(
                f"{self._name} is no picture that can be read (png, jpeg or webp)",
                param=self._name,
            ) from None
