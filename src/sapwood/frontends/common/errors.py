"""Errors as each dialect spells them on the wire; a stack trace never leaves the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import orjson
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, SapwoodError
from sapwood.schema.output import Finish

RETRY_AFTER_S = 1
"""Said to a client that got a 503: queues and restarts take seconds, not minutes."""

ANTHROPIC_OVERLOADED = 529
"""What Anthropic's API sends where HTTP has 503."""

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
"""A client's own text may be part of a message; of a name of ten megabytes it gets the ends."""

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


class EngineFailed(SapwoodError):
    """The engine ended a request with an error; status and type are the engine's."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish.message or "the engine failed on this request and gave no reason")
        self.status = finish.status
        self.type = finish.error_type


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
    """The native routes' body, and that of an error event inside any stream."""
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
    """The text's beginning and end if it is longer: the way out is told at the end."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"


def body_for_path(path: str) -> ErrorBody:
    # OpenAI nests its errors; the older routes keep the flat form that SGLang's clients know.
    if path == "/v1/responses" or path.startswith("/v1/responses/"):
        return native_body
    if path == "/invocations":
        return openai_body
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return anthropic_body
    if path.startswith("/api/"):
        return ollama_body
    return openai_body if path.startswith("/v1/") or path == "/v1" else native_body


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
    is_busy = error.status in (503, ANTHROPIC_OVERLOADED)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if is_busy else None
    return json_response(body(error), error.status, headers)


def internal_error() -> SapwoodError:
    """What a client hears of a bug of ours, which the log describes."""
    return SapwoodError("the server failed on this request; its log says why")
