"""A request's body: bounded in size and depth, JSON whatever its content type says."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import orjson
from starlette.requests import Request

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.common.errors import BodyTooLarge

MAX_BODY_BYTES = 64 * 2**20
MAX_DEPTH = 100
"""Arrays and objects inside one another; the parser itself stops at 1024."""

_KEY = re.compile(rb'"([^"\\]{1,64})"\s*:')
_KEY_WINDOW_BYTES = 4096


async def read_json(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in the request's body.

    optional  an empty body counts as {}
    Raises    InvalidRequest for a body that is not a JSON object, BodyTooLarge (413), and
              ClientDisconnect if the client leaves while it sends.
    """
    raw = await _read(request)
    if optional and not raw.strip():
        return {}
    return parse_object(raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise InvalidRequest("the request's body is empty; send a JSON object")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _not_json(raw, error) from None
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"the request's body is a JSON {type(value).__name__}; send a JSON object"
        )
    # Counting brackets is far cheaper than walking, and settles it for nearly every body.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


async def _read(request: Request) -> bytes:
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise InvalidRequest(f"content-encoding {encoding} is not supported; send plain JSON")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise _too_large(int(declared))
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large(num_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(num_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the request's body has {num_bytes} bytes or more, but at most {MAX_BODY_BYTES} are "
        "accepted; send fewer prompts per request"
    )


def _not_json(raw: bytes, error: orjson.JSONDecodeError) -> InvalidRequest:
    try:
        text = raw.decode()
    except UnicodeDecodeError as broken:
        where, name = _last_key(raw, broken.start)
        return InvalidRequest(
            f"the request's body is not UTF-8: byte {broken.start}{where} is "
            f"0x{raw[broken.start]:02x}; encode the JSON as UTF-8",
            param=name,
        )
    where, name = _last_key(raw, len(text[: error.pos].encode()))
    return InvalidRequest(f"the request's body is not JSON: {error}{where}", param=name)


def _last_key(raw: bytes, offset: int) -> tuple[str, str | None]:
    """The last object key before that byte: what a person looks for in their body."""
    keys = _KEY.findall(raw, max(0, offset - _KEY_WINDOW_BYTES), offset)
    if not keys:
        return "", None
    name = keys[-1].decode(errors="replace")
    return f", at or after field {name!r}", name


def _check_depth(value: Collection[Any]) -> None:
    """InvalidRequest if containers lie deeper than MAX_DEPTH; level by level, no recursion."""
    level: list[Collection[Any]] = [value]
    for _ in range(MAX_DEPTH):
        level = [item for held in level for item in _items(held) if type(item) in (list, dict)]
        if not level:
            return
    raise InvalidRequest(f"the request's JSON is nested deeper than {MAX_DEPTH} levels")


def _items(held: Collection[Any]) -> Collection[Any]:
    return held.values() if isinstance(held, dict) else held
