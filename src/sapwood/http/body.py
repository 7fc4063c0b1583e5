"""A request's body: bounded in size and depth, JSON whatever its content type says."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request

from sapwood.base.errors import InvalidRequest
from sapwood.base.nesting import is_deeper
from sapwood.http.errors import BodyTooLarge, BodyTooSlow
from sapwood.http.raw_headers import find
from sapwood.schema.limits import BODY_BYTES, BODY_DEPTH


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """Limits on the body of a request.

    max_depth  levels of nested arrays and objects; the parser itself stops at 1024
    timeout_s  seconds from the request's head to the end of its body; 0: no limit
    """

    max_bytes: int = BODY_BYTES.most
    max_depth: int = BODY_DEPTH.most
    timeout_s: float = 60.0


MAX_DEPTH = BodyLimits().max_depth

_KEY = re.compile(rb'"([^"\\]{1,64})"\s*:')
_KEY_WINDOW_BYTES = 4096


async def read_json(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in the request's body.

    optional  an empty body counts as {}
    Raises    InvalidRequest for a body that is not a JSON object, BodyTooLarge (413), BodyTooSlow
              (408), and ClientDisconnect if the client leaves while it sends.
    """
    raw = await read_bytes(request)
    if optional and not raw.strip():
        return {}
    return parse_object(raw, max_depth=body_limits(request).max_depth)


def body_limits(request: Request) -> BodyLimits:
    """The limits on bodies that `create_app` has given to the application."""
    limits = getattr(request.app.state, "body_limits", None)
    return limits if isinstance(limits, BodyLimits) else BodyLimits()


def parse_object(raw: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
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
    if raw.count(b"[") + raw.count(b"{") > max_depth and is_deeper(value, max_depth):
        raise InvalidRequest(f"the request's JSON is nested deeper than {max_depth} levels")
    return value


async def read_bytes(request: Request) -> bytes:
    """The request's body, whatever it holds; raises as `read_json` does, but for its JSON."""
    limits = body_limits(request)
    if limits.timeout_s <= 0:
        return await _read(request, limits.max_bytes)
    try:
        async with asyncio.timeout(limits.timeout_s):
            return await _read(request, limits.max_bytes)
    except TimeoutError:
        raise BodyTooSlow(
            f"the request's body had not arrived after {limits.timeout_s:g} s; send it faster, or "
            "start the server with a larger --request-body-timeout"
        ) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    headers = request.scope["headers"]
    encoding = find(headers, b"content-encoding", b"identity").decode("latin-1").lower()
    if encoding != "identity":
        raise InvalidRequest(f"content-encoding {encoding} is not supported; send plain JSON")
    declared = find(headers, b"content-length", b"").decode("latin-1")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(int(declared), max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(num_bytes, max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(num_bytes: int, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the request's body has {num_bytes} bytes or more, but at most {max_bytes} are "
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
    """The last object key before that byte, by which a person finds the place in their body."""
    keys = _KEY.findall(raw, max(0, offset - _KEY_WINDOW_BYTES), offset)
    if not keys:
        return "", None
    name = keys[-1].decode(errors="replace")
    return f", at or after field {name!r}", name
