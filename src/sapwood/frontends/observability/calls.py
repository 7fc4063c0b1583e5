"""Counts HTTP calls, and puts each call into the context of the tasks that it starts."""

from __future__ import annotations

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sapwood.observe.call import Call, current_call
from sapwood.observe.requests import RequestObserver

UNMATCHED = "unmatched"
"""The endpoint label of calls that match no route, so that strangers cannot invent label values."""
LEFT = 499
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_MAX_LABELS_BYTES = 4096


class ObservedCalls:
    """ASGI middleware that counts each call and makes a `Call` of it.

    The application gets the server's own `receive`; `send` only looks at a message's type.

    custom_labels_header  the header with the caller's metric labels; it is read only if the
                          metrics allow any
    """

    def __init__(
        self, app: ASGIApp, *, observer: RequestObserver, custom_labels_header: str
    ) -> None:
        self._app = app
        self._observer = observer
        self._header = custom_labels_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = LEFT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        call = self._begin(scope)
        token = current_call.set(call)
        metrics = self._observer.metrics
        metrics.num_open_calls += 1
        try:
            await self._app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            current_call.reset(token)
            metrics.num_open_calls -= 1
            self._end(scope, call, status)

    def _begin(self, scope: Scope) -> Call:
        headers = Headers(scope=scope)
        call = Call(path=scope["path"], labels=self._labels(headers))
        tracing = self._observer.tracing
        if tracing is not None and scope["method"] == "POST":
            carrier = {
                name: headers[name] for name in ("traceparent", "tracestate") if name in headers
            }
            call.trace = tracing.start(
                f"POST {scope['path']}",
                parent=carrier,
                is_server=True,
                attributes={"http.request.method": "POST", "url.path": scope["path"]},
            )
        return call

    def _end(self, scope: Scope, call: Call, status: int) -> None:
        route = scope.get("route")
        endpoint = getattr(route, "path", None) or UNMATCHED
        method = scope["method"] if scope["method"] in _METHODS else "other"
        metrics = self._observer.metrics
        metrics.http_requests[endpoint, method] += 1
        metrics.http_responses[endpoint, method, str(status)] += 1
        if call.trace is not None:
            call.trace.set_attribute("http.route", endpoint)
            call.trace.set_attribute("http.response.status_code", status)
            call.trace.end()

    def _labels(self, headers: Headers) -> tuple[str, ...]:
        metrics = self._observer.metrics
        if not metrics.custom_labels:
            return ()
        raw = headers.get(self._header)
        if raw is None or len(raw) > _MAX_LABELS_BYTES:
            return ()
        try:
            given = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return ()
        return metrics.labels_of(given) if isinstance(given, dict) else ()
