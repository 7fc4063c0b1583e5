"""Server-sent events as plain ASGI: cheap per event, and a disconnect ends the work at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sapwood.base.errors import SapwoodError
from sapwood.http.errors import (
    ErrorBody,
    error_response,
    internal_error,
    native_body,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class Disconnected(Exception):
    """The client closed the connection before the answer was complete."""


def event(content: object) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """The bytes around the events of a dialect's streams.

    end      bytes after the last event, whether that is an error or not
    failure  makes the event for an error that comes after the first event
    """

    content_type: bytes
    end: bytes
    failure: Callable[[SapwoodError], bytes]

    @property
    def start(self) -> Message:
        headers = [
            (b"content-type", self.content_type),
            (b"cache-control", b"no-cache"),
            # Proxies of the nginx kind would otherwise hold events back until a buffer is full.
            (b"x-accel-buffering", b"no"),
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}


EVENT_STREAM = b"text/event-stream; charset=utf-8"

ENDED_BY_DONE = Framing(
    content_type=EVENT_STREAM, end=DONE, failure=lambda error: event(native_body(error))
)
"""The framing of OpenAI's streams and of the native ones."""


async def until_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`; when the client leaves, `work` is cancelled and Disconnected is raised.

    The request's body must have been read before: then the next message can only be the disconnect.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise Disconnected
    finally:
        worker.cancel()
        watcher.cancel()
        # Waited for, so that the engine knows of the abort before this connection is forgotten.
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


class EventStream(Response):
    """Sends events as they come; the status line waits for the first event.

    So an error before the first event gets its own HTTP status; a later error becomes an event and
    ends the stream. Each item of `events` is one or more whole events, already encoded.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        error_body: ErrorBody,
        framing: Framing = ENDED_BY_DONE,
    ) -> None:
        self._events = events
        self._error_body = error_body
        self._framing = framing
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            refused = await until_disconnect(self._send_events(_checked(send)), receive)
        except Disconnected:
            logger.debug("the client of a stream left")
            return
        if refused is not None:
            await error_response(refused, self._error_body)(scope, receive, send)

    async def _send_events(self, send: Send) -> SapwoodError | None:
        """Send all events. Returns the error that came before the first event; None: none did."""
        started = False
        framing = self._framing
        last = framing.end
        try:
            async with aclosing(self._events) as events:
                async for encoded in events:
                    if not started:
                        await send(framing.start)
                        started = True
                    await send({"type": "http.response.body", "body": encoded, "more_body": True})
        except Disconnected:
            raise
        except SapwoodError as error:
            if not started:
                return error
            last = framing.failure(error) + framing.end
        except Exception:
            logger.exception("a stream failed")
            if not started:
                return internal_error()
            last = framing.failure(internal_error()) + framing.end
        if not started:
            await send(framing.start)
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return None


def _checked(send: Send) -> Send:
    """Some servers raise OSError when they send to a client that left; others drop the message."""

    async def checked(message: Message) -> None:
        try:
            await send(message)
        except OSError as error:
            raise Disconnected from error

    return checked
