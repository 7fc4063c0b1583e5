"""POSTs to an application in the same process, by the same code that answers HTTP.

The application has no guards (`frontends.server.inner_app`): a call from inside has passed them
already, or does not come from a client at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import orjson
from starlette.types import ASGIApp, Message

from sapwood.base.errors import SapwoodError
from sapwood.http.errors import internal_error

log = logging.getLogger(__name__)

RawHeaders = Sequence[tuple[bytes, bytes]]

_EVENT, _DONE = b"data: ", b"[DONE]"


class Post(Protocol):
    """POSTs a JSON object to a path. Returns (status, body) of the answer."""

    def __call__(self, path: str, body: dict[str, Any], /) -> Awaitable[tuple[int, bytes]]: ...


class Refused(SapwoodError):
    """The application answered with an error."""

    def __init__(self, status: int, content: bytes) -> None:
        told = orjson.loads(content)
        told = told.get("error", told)
        super().__init__(told["message"], param=told.get("param"))
        self.status = status
        self.type = told["type"]


def in_process(app: ASGIApp) -> Post:
    """A `Post` to that application. Cancelling a call is like a client that disconnects."""

    async def post(path: str, body: dict[str, Any], /) -> tuple[int, bytes]:
        status = 500
        parts: list[bytes] = []

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        await _call(app, path, body, (), send)
        return status, b"".join(parts)

    return post


async def streamed(
    app: ASGIApp, path: str, body: dict[str, Any], headers: RawHeaders = ()
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of an answer, as objects. Closing the generator is like a client's disconnect.

    Raises Refused if the status is not 200, and for an error event.
    """
    arrived: asyncio.Queue[Message | None] = asyncio.Queue()

    async def send(message: Message) -> None:
        arrived.put_nowait(message)

    async def call() -> None:
        try:
            await _call(app, path, body, headers, send)
        finally:
            arrived.put_nowait(None)

    task = asyncio.create_task(call())
    try:
        start = await arrived.get()
        if start is None:
            # The call has ended without an answer, by an error that is raised here.
            await task
            raise internal_error()
        while (message := await arrived.get()) is not None:
            content = message.get("body", b"")
            if start["status"] != 200:
                raise Refused(start["status"], content)
            for told in _events(content):
                if "error" in told and "choices" not in told:
                    raise Refused(told["error"]["code"], orjson.dumps(told))
                yield told
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _events(content: bytes) -> list[dict[str, Any]]:
    texts = [part.removeprefix(_EVENT) for part in content.split(b"\n\n") if part]
    return [orjson.loads(text) for text in texts if text != _DONE]


async def _call(
    app: ASGIApp,
    path: str,
    body: dict[str, Any],
    headers: RawHeaders,
    send: Callable[[Message], Awaitable[None]],
) -> None:
    content = orjson.dumps(body)
    has_answered = False

    async def noted(message: Message) -> None:
        nonlocal has_answered
        has_answered = True
        await send(message)

    try:
        await app(_scope(path, len(content), headers), _receive(content), noted)
    except Exception:
        # Starlette answers a bug of ours with its body, and raises it again for a server's log.
        log.exception("a call of %s inside this process failed", path)
        if not has_answered:
            raise internal_error() from None


def _receive(content: bytes) -> Callable[[], Awaitable[Message]]:
    messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            # There is no connection that could break; a caller that gives up cancels the call.
            await asyncio.Event().wait()
        return messages.pop()

    return receive


def _scope(path: str, num_bytes: int, headers: RawHeaders) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            *headers,
            (b"host", b"in-process"),
            (b"content-type", b"application/json"),
            (b"content-length", str(num_bytes).encode()),
        ],
        "client": None,
        "server": None,
        "state": {},
    }
