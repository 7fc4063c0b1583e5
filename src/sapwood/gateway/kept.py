"""A worker's response on its way to the client: shown as the gateway's own, and kept at its end.

A whole answer is held back until it is kept. Of a stream only the events that show the whole
response are looked into; all others pass as they are, and the last one waits until the response is
kept, so that a client can go on from it at once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sapwood.base.errors import SapwoodError
from sapwood.gateway.exchange import BadGateway
from sapwood.gateway.items import output_items
from sapwood.history.interface import History, Item, Record, is_open
from sapwood.http.errors import internal_error
from sapwood.http.raw_headers import find

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
"""Of a whole answer, or of one event of a stream."""

# In a text the quotes would be escaped, so a model cannot write this.
_SHOWS_RESPONSE = re.compile(
    rb'"type"\s*:\s*"response\.(?:queued|created|in_progress|completed|incomplete|failed)"'
)
_STATUSES = frozenset({"completed", "incomplete", "failed", "cancelled", "queued", "in_progress"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How one response is shown and kept.

    items            its input, without what came before
    conversation_id  a conversation to which input and output are added
    """

    history: History
    response_id: str
    items: Sequence[Item]
    previous_id: str | None
    conversation_id: str | None

    def shown(self, told: object) -> Record:
        """The worker's response as the gateway's; BadGateway if it is none."""
        if not isinstance(told, dict) or told.get("status") not in _STATUSES:
            raise BadGateway("the worker's answer is no response; see the gateway's log")
        try:
            output = output_items(told.get("output") or [])
        except TypeError as error:
            raise BadGateway(f"the worker's answer is no response: {error}") from error
        conversation = None if self.conversation_id is None else {"id": self.conversation_id}
        created_at = told.get("created_at")
        return {
            **told,
            "id": self.response_id,
            "created_at": created_at if isinstance(created_at, int | float) else time.time(),
            "output": output,
            "previous_response_id": self.previous_id,
            "conversation": conversation,
            "store": True,
        }

    async def keep(self, shown: Record) -> None:
        is_answer = shown["status"] in ("completed", "incomplete")
        conversation_id = self.conversation_id if is_answer else None
        await self.history.add(shown, self.items, conversation_id)


class Kept(Response):
    """The answer of `forwarded`, which is kept.

    Only a response that has ended is kept: not one whose client left, or whose worker failed.
    """

    def __init__(self, forwarded: Response, keeping: Keeping) -> None:
        self._forwarded = forwarded
        self._keeping = keeping
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        way = _Way(send, self._keeping)
        await self._forwarded(scope, receive, way.send)
        if way.is_held_back:
            raise BadGateway("the worker's answer broke off; ask again")


class _Way:
    """What is sent, with the response in it exchanged."""

    def __init__(self, send: Send, keeping: Keeping) -> None:
        self._send = send
        self._keeping = keeping
        self._start: Message | None = None
        self._pass = self._pass_all
        self._rest = bytearray()

    @property
    def is_held_back(self) -> bool:
        """Whether an answer has begun of which the client has seen nothing."""
        return self._start is not None

    async def send(self, message: Message) -> None:
        if message["type"] != "http.response.start":
            await self._pass(message)
            return
        content_type = find(message["headers"], b"content-type", b"")
        if message["status"] != 200:
            await self._send(message)
        elif content_type.startswith(b"text/event-stream"):
            self._pass = self._pass_events
            await self._send({**message, "headers": _unmeasured(message["headers"])})
        else:
            self._pass = self._hold
            self._start = message

    async def _pass_all(self, message: Message) -> None:
        await self._send(message)

    async def _ignore(self, message: Message) -> None:
        """What a worker sends after the end that the gateway has made."""

    async def _hold(self, message: Message) -> None:
        self._rest += message.get("body", b"")
        if len(self._rest) > MAX_BYTES:
            raise BadGateway(f"the worker's response has more than {MAX_BYTES} bytes")
        if message.get("more_body"):
            return
        shown = self._keeping.shown(_parsed(self._rest))
        if not is_open(shown):
            await self._keeping.keep(shown)
        body = orjson.dumps(shown)
        assert self._start is not None
        head = _unmeasured(self._start["headers"])
        head.append((b"content-length", b"%d" % len(body)))
        start, self._start = self._start, None
        await self._send({**start, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def _pass_events(self, message: Message) -> None:
        try:
            ready = await self._events(message.get("body", b""), bool(message.get("more_body")))
        except Exception as error:
            if not isinstance(error, SapwoodError):
                log.exception("a streamed response could not be kept")
                error = internal_error()
            log.warning("a streamed response is not kept: %s", error.message)
            self._pass = self._ignore
            body = failure_event(error, 0)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
            return
        if ready or not message.get("more_body"):
            await self._send({**message, "body": ready})

    async def _events(self, piece: bytes, more: bool) -> bytes:
        """What can be sent now: whole events, or all that is left."""
        looked_at = max(0, len(self._rest) - 3)
        self._rest += piece
        if more:
            end = max(
                self._rest.rfind(b"\n\n", looked_at) + 2,
                self._rest.rfind(b"\r\n\r\n", looked_at) + 4,
            )
            if end <= 3 and not self._rest.startswith(b"\n\n"):
                end = 0
        else:
            end = len(self._rest)
        if len(self._rest) - end > MAX_BYTES:
            raise BadGateway(f"an event of the worker has more than {MAX_BYTES} bytes")
        whole = bytes(self._rest[:end])
        del self._rest[:end]
        if _SHOWS_RESPONSE.search(whole) is None:
            return whole
        blocks = re.split(rb"(\r?\n\r?\n)", whole)
        return b"".join([await self._exchanged(block) for block in blocks])

    async def _exchanged(self, block: bytes) -> bytes:
        if _SHOWS_RESPONSE.search(block) is None:
            return block
        lines = block.splitlines()
        told = _parsed(b"".join(line[5:] for line in lines if line.startswith(b"data:")))
        if not isinstance(told, dict) or not isinstance(told.get("response"), Mapping):
            return block
        shown = self._keeping.shown(told["response"])
        if not is_open(shown):
            await self._keeping.keep(shown)
        others = [line for line in lines if not line.startswith(b"data:")]
        return b"\n".join([*others, b"data: " + orjson.dumps({**told, "response": shown})])


def _unmeasured(head: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in head if name != b"content-length"]


def _parsed(text: bytes | bytearray) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadGateway(f"the worker's answer is no JSON: {error}") from error


def failure_event(error: SapwoodError, number: int) -> bytes:
    """The last event of a stream that fails. Source: OpenAI's reference of streaming events."""
    content = {"code": str(error.status), "message": error.message, "param": error.param}
    told = {"type": "error", "sequence_number": number, **content}
    return b"event: error\ndata: " + orjson.dumps(told) + b"\n\n"
