"""The routes of /v1/files: the inputs and the results of batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.batches.protocol import EXPIRY_FIELDS, MAX_LIFE_S, MIN_LIFE_S
from sapwood.frontends.batches.store import BatchStore
from sapwood.http.body import body_limits
from sapwood.http.errors import BodyTooLarge, BodyTooSlow, json_response
from sapwood.http.listing import check_query, page, query_choice, query_int
from sapwood.schema.fields import parse
from sapwood.schema.limits import BATCH_FILE, UPLOAD_FIELD

MAX_FILE_BYTES = BATCH_FILE.most
"""As in OpenAI's API."""
MAX_FIELD_BYTES = UPLOAD_FIELD.most
PURPOSES = ("batch",)
MAX_LISTED = 10_000

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = frozenset({"file", "purpose", _ANCHOR, _SECONDS})

FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        _ANCHOR: {"type": "string", "enum": ["created_at"]},
        _SECONDS: {"type": "integer", "minimum": MIN_LIFE_S, "maximum": MAX_LIFE_S},
    },
}


async def upload(request: Request, store: BatchStore) -> Response:
    """POST /v1/files. The parts of the form go to disk as they arrive, and not to memory."""
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise InvalidRequest(
            f"the content type is {kind[:80]!r} but must be multipart/form-data, with the parts "
            "file and purpose"
        )
    parser = MultiPartParser(
        request.headers,
        _bounded(request),
        max_files=1,
        max_fields=len(_FIELDS),
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeDecodeError, LookupError) as error:
        reason = getattr(error, "message", str(error))
        raise InvalidRequest(f"the form cannot be read: {reason}") from None
    try:
        file, lives_s = _checked(form)
        record = await store.add_file(
            file.file,
            filename=(file.filename or "upload.jsonl")[:255],
            purpose=str(form["purpose"]),
            lives_s=lives_s,
        )
    finally:
        await form.close()
    return json_response(msgspec.to_builtins(record))


async def list_files(request: Request, store: BatchStore) -> Response:
    query = request.query_params
    check_query(query, ("after", "limit", "order", "purpose"))
    limit = query_int(query, "limit", MAX_LISTED, low=1, high=MAX_LISTED)
    found = await store.files(
        after=query.get("after"),
        limit=limit + 1,
        newest_first=query_choice(query, "order", ("desc", "asc")) == "desc",
        purpose=query.get("purpose"),
    )
    items = [msgspec.to_builtins(record) for record in found[:limit]]
    return json_response(page(items, has_more=len(found) > limit))


async def shown(file_id: str, store: BatchStore) -> Response:
    return json_response(msgspec.to_builtins(await store.file(file_id)))


async def content(file_id: str, store: BatchStore) -> Response:
    record = await store.file(file_id)
    return FileResponse(
        store.path_of(record.id), media_type="application/octet-stream", filename=record.filename
    )


async def delete(file_id: str, store: BatchStore) -> Response:
    await store.delete_file(file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


async def _bounded(request: Request) -> AsyncGenerator[bytes, None]:
    # The form has boundaries and other fields beside the file.
    limit = MAX_FILE_BYTES + 2**16
    declared = request.headers.get("content-length", "")
    num_bytes = int(declared) if declared.isdecimal() else 0
    if num_bytes <= limit:
        num_bytes = 0
        # A large file may take long, but every part of it must come in time.
        patience_s = body_limits(request).timeout_s or None
        parts = request.stream()
        while num_bytes <= limit:
            try:
                async with asyncio.timeout(patience_s):
                    part = await anext(parts, None)
            except TimeoutError:
                raise BodyTooSlow(f"nothing of the file came for {patience_s:g} s") from None
            if part is None:
                return
            num_bytes += len(part)
            if num_bytes <= limit:
                yield part
    raise BodyTooLarge(
        f"the upload has more than {MAX_FILE_BYTES} bytes; split the file into several"
    )


def _checked(form: FormData) -> tuple[UploadFile, int | None]:
    """(the uploaded file, seconds until the server deletes it)"""
    for name in form:
        if name not in _FIELDS:
            known = ", ".join(sorted(_FIELDS))
            raise InvalidRequest(f"unknown form field {name!r}; known are {known}", param=name)
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise InvalidRequest("file is required, as a part with a file name", param="file")
    if purpose is None:
        raise InvalidRequest("purpose is required", param="purpose")
    if purpose not in PURPOSES:
        raise UnsupportedFeature(
            f"purpose is {str(purpose)[:40]!r} but must be 'batch'; files are for batches only",
            param="purpose",
        )
    if not file.size:
        raise InvalidRequest("file is empty", param="file")
    if _ANCHOR not in form and _SECONDS not in form:
        return file, None
    seconds = str(form.get(_SECONDS, ""))
    given: dict[str, Any] = {
        "anchor": form.get(_ANCHOR),
        "seconds": int(seconds) if seconds.isdecimal() and len(seconds) < 12 else seconds,
    }
    return file, parse(given, EXPIRY_FIELDS, where="expires_after").seconds
