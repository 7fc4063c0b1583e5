"""How a client is told of a response with MCP tools: at its end, or event by event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Message, Send

from sapwood.base.errors import SapwoodError
from sapwood.gateway.exchange import BadGateway
from sapwood.gateway.headers import is_event_stream
from sapwood.gateway.held import Held
from sapwood.gateway.kept import MAX_BYTES, failure_event
from sapwood.gateway.mcp.tools import Offered
from sapwood.history.interface import Item, new_id
from sapwood.http.raw_headers import RawHeaders

MAX_ITEMS = 1 << 16
"""Of one answer of a worker."""
_BEGUN = frozenset({"response.created", "response.queued", "response.in_progress"})
_ENDED = frozenset({"response.completed", "response.incomplete", "response.failed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a worker answered to one turn.

    told  its response; None: it has refused, in `body`
    """

    status: int
    head: RawHeaders
    body: bytes
    told: dict[str, Any] | None


class Telling(Protocol):
    """What happens while a response is made, in the order in which it happens.

    A position is an item's place in the output.
    """

    def begin_turn(self, position: int) -> None:
        """A worker will be asked; its first item will have that position."""
        ...

    def sink(self) -> Sink:
        """Takes what the worker answers."""
        ...

    def id_of(self, position: int) -> str:
        """The id of the call there."""
        ...

    async def calls(self, position: int, item: Item) -> None:
        """A tool is about to be called."""
        ...

    async def done(self, position: int, item: Item) -> None:
        """That item is as it will stay."""
        ...

    def refused(self, answered: Answered) -> Response:
        """What the client gets. BadGateway if it has got something already."""
        ...

    async def finish(self, answered: Answered, shown: Mapping[str, Any]) -> Response | None:
        """The response is made; None: the client has it already."""
        ...


class Sink(Protocol):
    async def send(self, message: Message) -> None: ...

    def answered(self) -> Answered:
        """BadGateway if the answer broke off, or is no response."""
        ...


class AtItsEnd:
    """Tells nothing before the whole response."""

    def begin_turn(self, position: int) -> None:
        """Nothing to tell."""

    def sink(self) -> Sink:
        return _Whole()

    def id_of(self, position: int) -> str:
        return new_id("mcp")

    async def calls(self, position: int, item: Item) -> None:
        """Nothing to tell."""

    async def done(self, position: int, item: Item) -> None:
        """Nothing to tell."""

    def refused(self, answered: Answered) -> Response:
        return _passed_on(answered, answered.body)

    async def finish(self, answered: Answered, shown: Mapping[str, Any]) -> Response | None:
        return _passed_on(answered, orjson.dumps(shown))


class _Whole(Held):
    def __init__(self) -> None:
        too_long = BadGateway(f"the worker's response has more than {MAX_BYTES} bytes")
        super().__init__(MAX_BYTES, too_long)

    def answered(self) -> Answered:
        if self.start is None or not self.is_whole:
            raise BadGateway("the worker's answer broke off; ask again")
        status, body = self.start["status"], bytes(self.body)
        told = _response(_parsed(body)) if status == 200 else None
        return Answered(status=status, head=list(self.start["headers"]), body=body, told=told)


class EventByEvent:
    """Tells the events of OpenAI's Responses API as things happen.

    A worker's own events pass with other numbers; those about calls of `tools` become the events
    of MCP calls. Nothing is sent before a worker has begun its first answer, so that a refusal
    keeps its status.

    lists   items that come first in the output
    shown   fields of the response as the request had them
    Source  https://platform.openai.com/docs/api-reference/responses-streaming
    """

    def __init__(
        self,
        send: Send,
        tools: Mapping[str, Offered],
        lists: Sequence[Item],
        shown: Mapping[str, Any],
    ) -> None:
        self._send = send
        self._tools = tools
        self._lists = lists
        self._shown = shown
        self._early: list[dict[str, Any]] = []
        self._number = 0
        self._base = 0
        self._ids: dict[int, str] = {}
        self._argued: set[int] = set()
        self._hidden: set[int] = set()
        self._added: set[int] = set()
        self._done: set[int] = set()
        self._begun: Mapping[str, Any] | None = None

    @property
    def has_begun(self) -> bool:
        return self._begun is not None

    def begin_turn(self, position: int) -> None:
        self._base = position

    def sink(self) -> Sink:
        return _Events(self)

    def id_of(self, position: int) -> str:
        return self._ids.setdefault(position, new_id("mcp"))

    async def calls(self, position: int, item: Item) -> None:
        if position not in self._added:
            await self._add_call(position, item)
        if position not in self._argued:
            told = {"output_index": position, "item_id": item["id"]}
            arguments = item["arguments"]
            await self._tell("response.mcp_call_arguments.delta", **told, delta=arguments)
            await self._tell("response.mcp_call_arguments.done", **told, arguments=arguments)

    async def done(self, position: int, item: Item) -> None:
        if item.get("type") == "mcp_call":
            if position not in self._added:
                await self.calls(position, item)
            if item["status"] != "incomplete":
                kind = f"response.mcp_call.{item['status']}"
                await self._tell(kind, output_index=position, item_id=item["id"])
        elif position not in self._added:
            await self._tell("response.output_item.added", output_index=position, item=item)
        if position not in self._done:
            await self._tell("response.output_item.done", output_index=position, item=item)

    def refused(self, answered: Answered) -> Response:
        if self.has_begun:
            said = answered.body[:500].decode("utf-8", "replace")
            raise BadGateway(f"the worker refused to go on, with {answered.status}: {said}")
        return _passed_on(answered, answered.body)

    async def finish(self, answered: Answered, shown: Mapping[str, Any]) -> Response | None:
        assert self._begun is not None
        same = {name: self._begun[name] for name in ("id", "created_at") if name in self._begun}
        kind = f"response.{shown['status']}"
        kind = kind if kind in _ENDED else "response.incomplete"
        await self._tell(kind, response={**shown, **same})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return None

    async def fail(self, error: SapwoodError) -> None:
        """The last event of a response that has begun and cannot be made."""
        body = failure_event(error, self._number)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def begin(self, head: RawHeaders, response: Mapping[str, Any]) -> None:
        """The first worker has begun to answer; only the first call does anything."""
        if self._begun is not None:
            return
        self._begun = begun = {
            **response,
            **self._shown,
            "status": "in_progress",
            "output": [],
            "usage": None,
        }
        head = [pair for pair in head if pair[0] != b"content-length"]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})
        await self._tell("response.created", response=begun)
        await self._tell("response.in_progress", response=begun)
        for position, item in enumerate(self._lists):
            told = {"output_index": position, "item_id": item["id"]}
            empty = {**item, "tools": []}
            await self._tell("response.output_item.added", output_index=position, item=empty)
            await self._tell("response.mcp_list_tools.in_progress", **told)
            await self._tell("response.mcp_list_tools.completed", **told)
            await self._tell("response.output_item.done", output_index=position, item=item)
        early, self._early = self._early, []
        for event in early:
            await self._tell(event.pop("type"), **event)

    async def from_worker(self, kind: str, event: Mapping[str, Any]) -> None:
        """An event of a worker's answer, in the middle of it."""
        fields = {name: value for name, value in event.items() if name != "type"}
        index = event.get("output_index")
        if index is None:
            await self._tell(kind, **fields)
            return
        if not isinstance(index, int) or not 0 <= index < MAX_ITEMS:
            raise BadGateway(f"the worker's answer has no item {str(index)[:20]}")
        position = fields["output_index"] = self._base + index
        item = event.get("item")
        if kind == "response.output_item.added" and isinstance(item, dict):
            tool = self._tool(item)
            if tool is None:
                self._added.add(position)
            elif tool.needs_approval:
                self._hidden.add(position)  # it is told of when it is whole
            else:
                await self._add_call(position, made_call(tool, item, self.id_of(position)))
                return
        if position in self._hidden:
            return
        if position in self._ids:
            await self._about_call(kind, position, event)
            return
        if kind == "response.output_item.done":
            self._done.add(position)
        await self._tell(kind, **fields)

    def _tool(self, item: Mapping[str, Any]) -> Offered | None:
        is_call = item.get("type") == "function_call"
        return self._tools.get(str(item.get("name"))) if is_call else None

    async def _add_call(self, position: int, item: Item) -> None:
        self._added.add(position)
        begun = {**item, "arguments": "", "status": "in_progress", "output": None, "error": None}
        await self._tell("response.output_item.added", output_index=position, item=begun)
        told = {"output_index": position, "item_id": item["id"]}
        await self._tell("response.mcp_call.in_progress", **told)

    async def _about_call(self, kind: str, position: int, event: Mapping[str, Any]) -> None:
        """A worker's event about a function that is a tool. The end of the item is the loop's."""
        for name, part in (("delta", "delta"), ("done", "arguments")):
            if kind == f"response.function_call_arguments.{name}":
                self._argued.add(position)
                told: dict[str, Any] = {"output_index": position, "item_id": self._ids[position]}
                told[part] = event.get(part) or ""
                await self._tell(f"response.mcp_call_arguments.{name}", **told)

    async def _tell(self, kind: str, **fields: Any) -> None:
        if self._begun is None:
            self._early.append({"type": kind, **fields})
            return
        event = {"type": kind, **fields, "sequence_number": self._number}
        self._number += 1
        body = b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": True})


class _Events:
    """Reads the events of one answer as they come, in pieces that may end anywhere."""

    def __init__(self, told_to: EventByEvent) -> None:
        self._told_to = told_to
        self._start: Message | None = None
        self._rest = bytearray()
        self._last: dict[str, Any] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        piece = message.get("body", b"")
        self._rest += piece
        # Most pieces of a long event have no end of a line, and then there is nothing to look for.
        if b"\n" in piece and self._is_stream:
            *whole, self._rest = self._rest.replace(b"\r\n", b"\n").split(b"\n\n")
            for text in whole:
                await self._event(bytes(text))
        if len(self._rest) > MAX_BYTES:
            raise BadGateway(f"an event of the worker has more than {MAX_BYTES} bytes")

    def answered(self) -> Answered:
        if self._start is None:
            raise BadGateway("the worker's answer broke off; ask again")
        if self._start["status"] == 200 and self._last is None:
            raise BadGateway("the worker's answer ended before its response did; ask again")
        return Answered(
            status=self._start["status"],
            head=list(self._start["headers"]),
            body=bytes(self._rest),
            told=self._last,
        )

    @property
    def _is_stream(self) -> bool:
        start = self._start
        return start is not None and start["status"] == 200 and is_event_stream(start["headers"])

    async def _event(self, text: bytes) -> None:
        data = b"".join(line[5:] for line in text.split(b"\n") if line.startswith(b"data:"))
        if not data or data.strip() == b"[DONE]" or self._last is not None:
            return
        event = _parsed(data)
        kind = event.get("type") if isinstance(event, dict) else None
        if not isinstance(kind, str) or kind == "error":
            raise BadGateway(f"the worker failed: {data[:500].decode('utf-8', 'replace').strip()}")
        assert self._start is not None
        if kind in _BEGUN or kind in _ENDED:
            response = event.get("response")
            if not isinstance(response, dict):
                raise BadGateway("the worker's answer is no response: it has no object")
            await self._told_to.begin(self._start["headers"], response)
            if kind in _ENDED:
                self._last = _response(response)
            return
        await self._told_to.from_worker(kind, event)


def made_call(
    tool: Offered, item: Mapping[str, Any], id_: str, status: str = "in_progress"
) -> Item:
    return {
        "id": id_,
        "type": "mcp_call",
        "server_label": tool.label,
        "name": tool.tool.name,
        "arguments": item.get("arguments") or "{}",
        "status": status,
        "output": None,
        "error": None,
        "approval_request_id": None,
    }


def _passed_on(answered: Answered, body: bytes) -> Response:
    answer = Response(body, status_code=answered.status)
    answer.raw_headers = [pair for pair in answered.head if pair[0] != b"content-length"]
    answer.raw_headers.append((b"content-length", b"%d" % len(body)))
    return answer


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadGateway(f"the worker's answer is no JSON: {error}") from None


def _response(told: object) -> dict[str, Any]:
    if not isinstance(told, dict) or not isinstance(told.get("status"), str):
        raise BadGateway("the worker's answer is no response")
    if not isinstance(told.get("output"), list):
        raise BadGateway("the worker's answer is no response: it has no list of items")
    return told
