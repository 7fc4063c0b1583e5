"""Errors as each dialect spells them on the wire; a stack trace never leaves the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import orjson
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, SapwoodError
from sapwood.schema.output import Finish

RETRY_AFTER_S = 1
"""Said to a client that got a 503: queues and restarts take seconds, not minutes."""

ErrorBody = Callable[[SapwoodError], dict[str, object]]


class BodyTooLarge(InvalidRequest):
    status = 413
    type = "RequestEntityTooLargeError"


class WrongMethod(InvalidRequest):
    status = 405
    type = "MethodNotAllowedError"


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
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.status,
    }


def native_body(error: SapwoodError) -> dict[str, object]:
    """The native routes' body, and that of an error event inside any stream."""
    return {"error": openai_body(error)}


def body_for_path(path: str) -> ErrorBody:
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
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else None
    return json_response(body(error), error.status, headers)


def internal_error() -> SapwoodError:
    """What a client hears of a bug of ours, which the log describes."""
    return SapwoodError("the server failed on this request; its log says why")
