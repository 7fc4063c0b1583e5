"""The multipart form of POST /v1/images/edits."""

from __future__ import annotations

import asyncio

from starlette.datastructures import FormData
from starlette.requests import Request

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.images.generations import Brought
from sapwood.frontends.images.pictures import decoded, decoded_mask
from sapwood.frontends.images.protocol import EDIT_FIELDS, EditRequest
from sapwood.http.form import opened_form
from sapwood.schema.fields import parse
from sapwood.schema.limits import INPUT_PICTURES, PICTURE_PROMPT

_PICTURES = ("image", "image[]")
_FILES = (*_PICTURES, "mask")
_FIELD_BYTES = 4 * PICTURE_PROMPT.most
"""UTF-8 has up to four bytes per character."""


async def read_edit(request: Request, *, max_pixels: int) -> tuple[EditRequest, Brought]:
    """InvalidRequest names what is missing, too large or no picture."""
    async with opened_form(
        request,
        parts="image and prompt",
        max_files=INPUT_PICTURES.most + 1,
        max_fields=len(EDIT_FIELDS.names),
        max_field_bytes=_FIELD_BYTES,
    ) as form:
        return await _read(form, max_pixels)


async def _read(form: FormData, max_pixels: int) -> tuple[EditRequest, Brought]:
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    files = [(name, value) for name, value in form.multi_items() if not isinstance(value, str)]
    for name, _ in files:
        if name not in _FILES:
            raise InvalidRequest(
                f"the form has the file {name[:80]!r}; files are {', '.join(_FILES)}", param=name
            )
    asked = parse(fields, EDIT_FIELDS)
    pictures = [await value.read() for name, value in files if name in _PICTURES]
    masks = [await value.read() for name, value in files if name == "mask"]
    if not pictures:
        raise InvalidRequest(
            "the form has no picture; send it as the file image (image[] for several)",
            param="image",
        )
    if len(masks) > 1:
        raise InvalidRequest("the form has several masks; send one", param="mask")
    INPUT_PICTURES.check(len(pictures), "image")
    return asked, await asyncio.to_thread(_brought, pictures, masks, asked.strength, max_pixels)


def _brought(
    pictures: list[bytes], masks: list[bytes], strength: float | None, max_pixels: int
) -> Brought:
    found = tuple(decoded(raw, "image", max_pixels=max_pixels) for raw in pictures)
    size = (found[0].width, found[0].height)
    mask = decoded_mask(masks[0], "mask", size, max_pixels=max_pixels) if masks else None
    return Brought(pictures=found, mask=mask, strength=strength)
