"""A request's multipart form: bounded like a JSON body, and read from memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from sapwood.base.errors import InvalidRequest
from sapwood.http.body import read_bytes


@asynccontextmanager
async def opened_form(
    request: Request, *, parts: str, max_files: int, max_fields: int, max_field_bytes: int
) -> AsyncIterator[FormData]:
    """The form, whose files are closed afterwards; large ones lie on the disk.

    parts   names of the parts that must be there, for errors
    Raises  InvalidRequest if it is no form, or has too much; as `read_bytes`
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise InvalidRequest(
            f"the content type is {kind[:80]!r} but must be multipart/form-data, with the parts "
            f"{parts}"
        )
    raw = await read_bytes(request)

    async def whole() -> AsyncGenerator[bytes, None]:
        yield raw
        yield b""

    parser = MultiPartParser(
        request.headers,
        whole(),
        max_files=max_files,
        max_fields=max_fields,
        max_part_size=max_field_bytes,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        why = getattr(error, "message", str(error))
        raise InvalidRequest(
            f"the form cannot be read: {why}; it may have {max_files} files and {max_fields} "
            f"fields of {max_field_bytes} bytes"
        ) from None
    try:
        yield form
    finally:
        await form.close()
