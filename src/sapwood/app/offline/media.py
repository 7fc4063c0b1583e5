"""Pictures and videos as a Python program has them: URLs, paths, bytes, arrays, PIL's pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.openai.parts import chat_part
from sapwood.frontends.serving.media import MediaParts, Part
from sapwood.multimodal.image import rgb
from sapwood.schema.media_source import MediaKind, MediaSource

_URLS = ("http:", "https:", "data:", "file:")


def media_of(
    images: Any, videos: Any, kinds: Iterable[MediaKind], where: str = ""
) -> Sequence[MediaSource]:
    """Of one prompt: its pictures, then its videos.

    images, videos  one, a list of them, or None
    where           stands before a medium's place in errors: "prompts[1]."
    """
    media = MediaParts(frozenset(kinds))
    for i, picture in enumerate(_listed(images)):
        add_medium(media, "image", picture, f"{where}images[{i}]")
    for i, video in enumerate(_listed(videos)):
        add_medium(media, "video", video, f"{where}videos[{i}]")
    return media.sources


def per_prompt(given: Any, count: int, name: str) -> list[Any]:
    """Of each of several prompts: a medium, a list of them, or None."""
    if given is None:
        return [None] * count
    if not isinstance(given, list | tuple) or len(given) != count:
        raise InvalidRequest(
            f"{name} must be a list with an entry for each of the {count} prompts: one, a list of "
            "them, or None",
            param=name,
        )
    return list(given)


def message_with_media(message: Mapping[str, Any], where: str, media: MediaParts) -> dict[str, Any]:
    """The message in the template's form; `media` takes what its parts show.

    A part may be one of OpenAI's ({"type": "image_url", …}), or {"type": "image", "image": …} and
    {"type": "video", "video": …} with anything that `images` and `videos` take.
    """
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    parts: list[Part | str] = []
    for i, part in enumerate(content):
        path = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif not isinstance(part, Mapping):
            raise InvalidRequest(f"{path} must be a mapping or a text", param=path)
        elif kind in ("image", "video"):
            parts.append(add_medium(media, kind, part.get(kind), path))
        else:
            parts.append(chat_part(part, path, media))
    return {**message, "content": parts}


def with_images(messages: Sequence[Mapping[str, Any]], images: Any) -> list[Mapping[str, Any]]:
    """The conversation with pictures before the text of the user's last message."""
    shown = [{"type": "image", "image": one} for one in _listed(images)]
    asked = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    if not shown:
        return list(messages)
    if not asked:
        raise InvalidRequest("images need a message of the user that shows them", param="images")
    last = messages[asked[-1]]
    content = last.get("content")
    rest = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    changed = {**last, "content": [*shown, *rest]}
    return [changed if i == asked[-1] else message for i, message in enumerate(messages)]


def add_medium(media: MediaParts, kind: MediaKind, given: Any, where: str) -> dict[str, str]:
    """The part that shows it; InvalidRequest with its place if it is none."""
    if isinstance(given, str) and given.lower().startswith(_URLS):
        return media.add(kind, where, url=given)
    if isinstance(given, str | Path):
        # The program's own files: it may read what it likes.
        try:
            data = Path(given).expanduser().read_bytes()
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{where} cannot be read: {error}", param=where) from None
        return media.add(kind, where, data=data)
    if isinstance(given, bytes | bytearray | memoryview):
        return media.add(kind, where, data=bytes(given))
    if kind == "video":
        frames = [_png_url(frame, f"{where}[{i}]") for i, frame in enumerate(_frames(given, where))]
        return media.add(kind, where, frames=tuple(frames))
    pixels = _pixels(given, where)
    height, width = pixels.shape[:2]
    return media.add(kind, where, data=pixels.tobytes(), raw_size=(width, height))


def _png_url(picture: Any, where: str) -> str:
    out = io.BytesIO()
    Image.fromarray(_pixels(picture, where)).save(out, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _frames(given: Any, where: str) -> list[Any]:
    frames = list(given) if isinstance(given, Iterable) else []
    if not frames:
        raise InvalidRequest(
            f"{where} must be a URL, a path, bytes, or a list of frames", param=where
        )
    return frames


def _pixels(given: Any, where: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[height, width, 3]"""
    if isinstance(given, Image.Image):
        return rgb(given)
    try:
        pixels = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):
        pixels = np.empty(0)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size:
        found = f"{type(given).__name__} {pixels.dtype} {list(pixels.shape)}"
        raise InvalidRequest(
            f"{where} must be a URL, a path, bytes, one of PIL's pictures, or an array of uint8 "
            f"with the shape [height, width] or [height, width, 3 or 4], not {found}",
            param=where,
        )
    if pixels.ndim == 3 and pixels.shape[2] not in (3, 4):
        raise InvalidRequest(
            f"{where} has the shape {list(pixels.shape)}; colours come last, 3 or 4 of them",
            param=where,
        )
    return rgb(Image.fromarray(pixels))
