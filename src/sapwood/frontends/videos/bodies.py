"""The body of POST /v1/videos: JSON, or a form with a file."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.images.pictures import decoded
from sapwood.frontends.videos.protocol import VIDEO_FIELDS, VideoRequest
from sapwood.http.body import read_json
from sapwood.http.form import opened_form
from sapwood.schema.fields import parse
from sapwood.schema.limits import PICTURE_PROMPT
from sapwood.schema.painting import InputPicture

_FILE = "input_reference"
_NESTED = "input_reference["
_DATA, _BASE64 = "data:image/", ";base64,"


async def read_video(
    request: Request, *, max_pixels: int, max_url_bytes: int
) -> tuple[VideoRequest, InputPicture | None]:
    """InvalidRequest names what is missing, too large or no picture."""
    kind = request.headers.get("content-type", "").lower()
    if kind.startswith("multipart/form-data"):
        async with opened_form(
            request,
            parts="prompt, and perhaps the file input_reference",
            max_files=1,
            max_fields=len(VIDEO_FIELDS.names) + 2,
            max_field_bytes=max(4 * PICTURE_PROMPT.most, max_url_bytes),
        ) as form:
            fields, raw = await _of_form(form)
    else:
        fields, raw = await read_json(request), None
    asked = parse(fields, VIDEO_FIELDS)
    if raw is None and asked.input_reference is not None:
        raw = _of_reference(asked.input_reference)
    if raw is None:
        return asked, None
    return asked, await asyncio.to_thread(decoded, raw, _FILE, max_pixels=max_pixels)


async def _of_form(form: FormData) -> tuple[Mapping[str, Any], bytes | None]:
    fields: dict[str, Any] = {}
    raw: bytes | None = None
    for name, value in form.multi_items():
        if isinstance(value, str):
            if name.startswith(_NESTED) and name.endswith("]"):
                fields.setdefault(_FILE, {})[name[len(_NESTED) : -1]] = value
            else:
                fields[name] = value
        elif name == _FILE:
            raw = await value.read()
        else:
            raise InvalidRequest(
                f"the form has the file {name[:80]!r}; the only file is {_FILE}", param=name[:80]
            )
    return fields, raw


def _of_reference(reference: str | dict[str, str]) -> bytes:
    """The bytes of a data URL."""
    url = reference
    if isinstance(reference, dict):
        if set(reference) != {"image_url"}:
            raise UnsupportedFeature(
                f"{_FILE} has {', '.join(sorted(reference))[:80] or 'nothing'}, but only image_url "
                "is supported: no files are kept here",
                param=_FILE,
            )
        url = reference["image_url"]
    assert isinstance(url, str)
    head, separator, body = url.partition(_BASE64)
    if not head.startswith(_DATA) or not separator:
        raise UnsupportedFeature(
            f"{_FILE} must be a file of a form, or a URL that begins with data:image/ and has the "
            "picture in base64; nothing is fetched, and no file of the server is read",
            param=_FILE,
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{_FILE} has no base64 after the comma", param=_FILE) from None
