"""A request and its answer on their way through the modules.

Where no module wants answers, they pass piece by piece; where one does, an answer is held back
until it is whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sapwood.base.errors import SapwoodError
from sapwood.gateway.headers import REQUEST_ID
from sapwood.gateway.held import Held
from sapwood.gateway.wasm.modules import Module, Modules
from sapwood.gateway.wasm.runtime import (
    ON_REQUEST,
    ON_RESPONSE,
    Action,
    Changes,
    Headers,
    ModuleFailed,
    Rejection,
    header_records,
    record,
)
from sapwood.http.body import read_bytes
from sapwood.http.endpoints import Handler
from sapwood.http.errors import BodyTooLarge
from sapwood.http.raw_headers import find

MAX_BODY_BYTES = 4 << 20
"""Of a request or an answer that a module looks at."""


class Rejected(SapwoodError):
    """A module refused the request."""

    type = "RejectedError"

    def __init__(self, status: int) -> None:
        super().__init__("a module of the gateway refused this request")
        self.status = status


def through(modules: Modules, handler: Handler) -> Handler:
    """The handler behind the modules, if there are any when it is called."""

    async def handle(request: Request) -> Response:
        asked, answered = modules.attached_to(ON_REQUEST), modules.attached_to(ON_RESPONSE)
        if not asked and not answered:
            return await handler(request)
        return _Inspected(modules, handler, request, asked, answered)

    return handle


class _Inspected(Response):
    def __init__(
        self,
        modules: Modules,
        handler: Handler,
        request: Request,
        asked: Sequence[Module],
        answered: Sequence[Module],
    ) -> None:
        self._modules = modules
        self._handler = handler
        self._request = request
        self._asked = asked
        self._answered = answered
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._asked:
            scope, receive = await self._request_changed(scope, receive)
        request = Request(scope, receive) if self._asked else self._request
        answer = await self._handler(request)
        if not self._answered:
            await answer(scope, receive, send)
            return
        held = Held(
            MAX_BODY_BYTES,
            ModuleFailed(
                f"the worker's answer has more than {MAX_BODY_BYTES} bytes, and a module of the "
                "gateway looks at no longer ones"
            ),
        )
        await answer(scope, receive, held.send)
        await self._send_changed(held, send)

    async def _request_changed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        body = await read_bytes(self._request)
        headers: Headers = list(scope["headers"])
        for module in self._asked:
            _check_size(len(body))
            value = record(
                method=scope["method"],
                path=scope["path"],
                query=scope["query_string"].decode("latin-1"),
                headers=header_records(headers),
                body=body,
                request_id=(find(headers, REQUEST_ID) or b"").decode("latin-1"),
                now_epoch_ms=int(1000 * time.time()),
            )
            action = await self._modules.call(module, ON_REQUEST, value)
            if isinstance(action, Rejection):
                raise Rejected(action.status)
            if action is not None:
                headers = action.of_headers(headers)
                body = body if action.body is None else action.body
        # The length that the client declared may be another one now.
        headers = [pair for pair in headers if pair[0] != b"content-length"]
        if body:
            headers.append((b"content-length", b"%d" % len(body)))
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return {**scope, "headers": headers}, again

    async def _send_changed(self, held: Held, send: Send) -> None:
        if held.start is None or not held.is_whole:
            raise ModuleFailed("the worker's answer broke off; ask again")
        status: int = held.start["status"]
        headers: Headers = list(held.start["headers"])
        body = bytes(held.body)
        for module in self._answered:
            value = record(status=status, headers=header_records(headers), body=body)
            action: Action = await self._modules.call(module, ON_RESPONSE, value)
            if isinstance(action, Rejection):
                raise Rejected(action.status)
            if isinstance(action, Changes):
                headers = action.of_headers(headers)
                body = body if action.body is None else action.body
                status = status if action.status is None else action.status
        headers = [pair for pair in headers if pair[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BODY_BYTES:
        raise BodyTooLarge(
            f"the request's body has {num_bytes} bytes, but the gateway's modules look at no more "
            f"than {MAX_BODY_BYTES}; send fewer prompts per request"
        )
