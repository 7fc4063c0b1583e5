"""Refusals of workers, in their own words."""

from __future__ import annotations

import msgspec

from sapwood.base.errors import SapwoodError

_ERROR_TYPES = {400: "BadRequestError", 404: "NotFoundError", 429: "RateLimitError"}


class Refused(SapwoodError):
    """A worker's refusal, in its own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.type = _ERROR_TYPES.get(
            status, "BadRequestError" if status < 500 else "InternalServerError"
        )


class _Problem(msgspec.Struct):
    message: str = ""


class _ErrorBody(msgspec.Struct):
    error: _Problem | str | None = None
    message: str = ""


def message_of(body: bytes) -> str:
    """What the body of an error says."""
    try:
        told = msgspec.json.decode(body, type=_ErrorBody)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return body[:500].decode("utf-8", "replace")
    if isinstance(told.error, _Problem):
        return told.error.message[:2000]
    return (told.error or told.message)[:2000]
