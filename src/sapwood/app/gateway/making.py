"""What all makers of answers at the gateway share: their form, and a body that is read twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope

from sapwood.frontends.serving.services import Services

Make = Callable[[Request, Services], Awaitable[Response]]
"""One endpoint of a dialect: answers a request by these services."""


def with_body(scope: Scope, body: bytes, receive: Receive) -> Request:
    """A request whose body has been read, for those who read it themselves."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return Request(scope, replayed)
