"""The parts of a message's content in OpenAI's dialect: text, pictures and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.openai.protocol import PART_FIELDS
from sapwood.frontends.serving.media import MediaParts, picture_options
from sapwood.schema.fields import parse
from sapwood.schema.media_source import MediaKind

_KINDS: Mapping[object, MediaKind] = {"image_url": "image", "video_url": "video"}


def chat_part(given: Mapping[str, Any], where: str, media: MediaParts) -> dict[str, str]:
    """The part in the template's form, its fields checked; `media` takes what it shows.

    Raises InvalidRequest or UnsupportedFeature with its place
    """
    field = given.get("type")
    kind = _KINDS.get(field) if isinstance(field, str) else None
    if kind is None:
        if isinstance(field, str) and field != "text":
            raise UnsupportedFeature(
                f"{where} is of type {field[:40]!r}, but this server takes only parts of type "
                f"'text', {', '.join(map(repr, _KINDS))}",
                param=where,
            )
        return {"type": "text", "text": parse(given, PART_FIELDS, where=where).text}
    asked = given.get(str(field))
    fields = asked if isinstance(asked, dict) else {"url": asked}
    url = fields.get("url")
    path = f"{where}.{field}"
    options = picture_options(fields, path)
    if not isinstance(url, str) or not url:
        raise InvalidRequest(f"{path}.url is required, a text", param=f"{path}.url")
    return media.add(kind, where, url=url, options=options)
