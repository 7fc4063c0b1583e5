"""A picture's file -> its pixels, RGB, as a person sees them."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sapwood.base.errors import InvalidRequest

Pixels = NDArray[np.uint8]
"""[height, width, 3]"""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")
"""Pillow knows more, some of which start other programs or are made of commands."""

_BACKGROUND = (255, 255, 255)

# All formats must be known before some of them are asked for.
Image.init()
# `check_size` decides, with a limit that the server's operator sets.
Image.MAX_IMAGE_PIXELS = None


def decoded(data: bytes, *, max_pixels: int) -> Pixels:
    """The pixels of a picture: turned as its EXIF says, over white where it is transparent, the
    first frame of an animation.

    Raises InvalidRequest if it is no picture, if it is cut off, or if it claims more than
    `max_pixels`, which is found out before anything is decoded.
    """
    with warnings.catch_warnings():
        # Pillow warns of odd files and of many pixels; both are decided here.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                check_size(*picture.size, max_pixels)
                picture.load()
                return rgb(picture)
        except UnidentifiedImageError:
            raise InvalidRequest(
                f"is no picture of a known format ({', '.join(FORMATS)}); it begins with "
                f"{data[:12]!r}"
            ) from None
        except InvalidRequest:
            raise
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as error:
            # The kinds of exceptions that Pillow's decoders raise on broken files.
            raise InvalidRequest(f"cannot be decoded: {error}"[:300]) from None


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InvalidRequest(f"has {width} x {height} pixels; it must have at least one")
    if width * height > max_pixels:
        raise InvalidRequest(
            f"has {width} x {height} pixels but this server takes at most {max_pixels}; send it "
            "smaller"
        )


def of_raw(data: bytes, width: int, height: int, *, max_pixels: int) -> Pixels:
    check_size(width, height, max_pixels)
    return np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)


def shrunk(pixels: Pixels, most: int) -> Pixels:
    """The picture with at most so many pixels on its longer side."""
    height, width = pixels.shape[:2]
    if max(height, width) <= most:
        return pixels
    scale = most / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def rgb(picture: Image.Image) -> Pixels:
    """Turned as its EXIF says, over white where it is transparent."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _of_deep_grey(picture)
    if picture.mode == "P" or picture.has_transparency_data:
        layered = picture.convert("RGBA")
        flat = Image.new("RGB", picture.size, _BACKGROUND)
        flat.paste(layered, mask=layered.getchannel("A"))
        return np.asarray(flat)
    return np.asarray(picture.convert("RGB"))


def _of_deep_grey(picture: Image.Image) -> Pixels:
    """Of 16 bits the upper 8; Pillow's own conversion would cut everything above 255 off."""
    if picture.mode == "F":
        raise InvalidRequest(
            "has floating point pixels, whose white is not defined; send it with 8 or 16 bits"
        )
    deep = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
    grey = (deep >> 8).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
