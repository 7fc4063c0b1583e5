"""The gateway's part of a request's trace.

gateway                            a child of the caller's traceparent
  ├─ attempt                       one worker, until the head of its answer
  └─ attempt                       another one, after a failure or as the other one of a pair
       └─ POST /v1/completions     the engine's own spans (observe/tracing.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from starlette.types import Scope

from sapwood.gateway.worker import Worker
from sapwood.http.raw_headers import RawHeaders
from sapwood.observe.tracing import TRACEPARENT, Attributes, Tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

TRACE_HEADERS = frozenset({b"traceparent", b"tracestate"})


class RequestSpan:
    """One request in the gateway, and its attempts."""

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span

    @contextmanager
    def attempt(self, worker: Worker) -> Iterator[AttemptSpan]:
        """A request to this worker is sent inside the block, which ends with its answer's head."""
        attributes: Attributes = {
            "server.address": worker.origin.host,
            "server.port": worker.origin.port,
        }
        span = self._tracing.start("attempt", parent=self._span, attributes=attributes)
        with _ended(span):
            yield AttemptSpan(self._tracing, span)

    def answered(self, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)


class AttemptSpan:
    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._span = span
        traceparent = tracing.traceparent(span).encode()
        self.headers: RawHeaders = [(TRACEPARENT.encode(), traceparent)] if traceparent else []
        """By these the worker's spans become children of this one."""

    def answered(self, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)


def request_span(
    tracing: Tracing | None, scope: Scope, request_id: bytes
) -> AbstractContextManager[RequestSpan | None]:
    """A span for the request inside the block; None: nothing is traced."""
    return nullcontext() if tracing is None else _request_span(tracing, scope, request_id)


@contextmanager
def _request_span(tracing: Tracing, scope: Scope, request_id: bytes) -> Iterator[RequestSpan]:
    headers = {
        name.decode(): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in TRACE_HEADERS
    }
    attributes: Attributes = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "sapwood.request_id": request_id.decode("latin-1"),
    }
    span = tracing.start("gateway", parent=headers, is_server=True, attributes=attributes)
    with _ended(span):
        yield RequestSpan(tracing, span)


@contextmanager
def _ended(span: Span) -> Iterator[None]:
    """The span ends with the block; an error is told by its kind, since its text may be private."""
    from opentelemetry.trace import Status, StatusCode

    try:
        yield
    except BaseException as error:
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        raise
    finally:
        span.end()
