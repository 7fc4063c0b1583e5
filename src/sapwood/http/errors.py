"""Errors as each dialect spells them on the wire; a stack trace never leaves the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import orjson
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, SapwoodError

RETRY_AFTER_S = 1
"""The header Retry-After of a 429 or 503: queues and restarts take seconds, not minutes."""

ANTHROPIC_OVERLOADED = 529
"""The status of Anthropic's API for an overloaded server, where others send 503."""

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    ANTHROPIC_OVERLOADED: "overloaded_error",
}

MAX_MESSAGE_CHARS = 2000
MAX_PARAM_CHARS = 200
"""A client's own text may be part of a message; a name of ten megabytes is cut to these lengths."""

ErrorBody = Callable[[SapwoodError], dict[str, object]]


class BodyTooLarge(InvalidRequest):
    status = 413
    type = "RequestEntityTooLargeError"


class WrongMethod(InvalidRequest):
    status = 405
    type = "MethodNotAllowedError"


class OtherOrigin(InvalidRequest):
    status = 403
    type = "PermissionDeniedError"


class NotAuthenticated(InvalidRequest):
    status = 401
    type = "AuthenticationError"


class NotAllowed(InvalidRequest):
    status = 403
    type = "PermissionDeniedError"


class BodyTooSlow(InvalidRequest):
    status = 408
    type = "RequestTimeoutError"


class RequestTimeout(SapwoodError):
    """The request has waited too long for its turn."""

    status = 408
    type = "RequestTimeoutError"


class TooManyRequests(SapwoodError):
    status = 429
    type = "RateLimitError"


def openai_body(error: SapwoodError) -> dict[str, object]:
    """OpenAI's body, flat as SGLang and vLLM send it; the official client reads both forms."""
    return {
        "object": "error",
        "message": _message(error),
        "type": error.type,
        "param": None if error.param is None else _shortened(error.param, MAX_PARAM_CHARS),
        "code": error.status,
    }


def native_body(error: SapwoodError) -> dict[str, object]:
    """The body of the native routes, and of an error event inside any stream."""
    return {"error": openai_body(error)}


def anthropic_body(error: SapwoodError) -> dict[str, object]:
    kind = _ANTHROPIC_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    return {"type": "error", "error": {"type": kind, "message": _message(error)}}


def ollama_body(error: SapwoodError) -> dict[str, object]:
    return {"error": _message(error)}


def _message(error: SapwoodError) -> str:
    return _shortened(error.message, MAX_MESSAGE_CHARS)


def _shortened(text: str, max_chars: int) -> str:
    """The beginning and the end of a text that is too long: the way out is told at the end."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """An error as OpenAI's endpoints send it; param: the field at fault, if there is one."""

    object: str
    message: str
    type: str
    param: str | None
    code: int


class NestedError(msgspec.Struct, frozen=True, kw_only=True):
    """An error as the native endpoints and /v1/responses send it."""

    error: Error


class AnthropicProblem(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    message: str


class AnthropicError(msgspec.Struct, frozen=True, kw_only=True):
    """An error as Anthropic's endpoints send it."""

    type: str
    error: AnthropicProblem


class OllamaError(msgspec.Struct, frozen=True, kw_only=True):
    """An error as Ollama's endpoints send it."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorForm:
    """How errors are spelled.

    body         makes the JSON of an error
    shape        the schema of that JSON
    busy_status  of a server that cannot take the request now
    """

    body: ErrorBody
    shape: type[msgspec.Struct]
    busy_status: int = 503


OPENAI_ERRORS = ErrorForm(body=openai_body, shape=Error)
"""Flat, as SGLang's clients know it; OpenAI itself nests its errors."""

NATIVE_ERRORS = ErrorForm(body=native_body, shape=NestedError)
ANTHROPIC_ERRORS = ErrorForm(
    body=anthropic_body, shape=AnthropicError, busy_status=ANTHROPIC_OVERLOADED
)
OLLAMA_ERRORS = ErrorForm(body=ollama_body, shape=OllamaError)


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        orjson.dumps(content),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


def error_response(error: SapwoodError, body: ErrorBody) -> Response:
    is_busy = error.status in (429, 503, ANTHROPIC_OVERLOADED)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if is_busy else None
    return json_response(body(error), error.status, headers)


def internal_error() -> SapwoodError:
    """The error that a client gets for a bug of ours, which only the log describes."""
    return SapwoodError("the server failed on this request; its log says why")
