"""A response that is made in turns: the worker answers, the gateway calls the MCP tools that the
model wants, and the worker goes on from their results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sapwood.base.errors import SapwoodError
from sapwood.gateway.chats import Respond
from sapwood.gateway.exchange import BadGateway, Proxy
from sapwood.gateway.mcp.connection import Outcome
from sapwood.gateway.mcp.items import called
from sapwood.gateway.mcp.telling import (
    Answered,
    AtItsEnd,
    EventByEvent,
    Telling,
    made_call,
)
from sapwood.gateway.mcp.tools import Offered, function_name, later_choice
from sapwood.gateway.proxy import ClientWatch, GatewayTimeout
from sapwood.history.interface import Item, new_id, too_long

log = logging.getLogger(__name__)

OnCall = Callable[[str, bool], None]
"""Is told the server's name and whether the call succeeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a response is made of.

    fields     of the worker's requests, without `input` and `tool_choice`
    items      the input, as a worker knows it
    tools      function name -> tool
    approved   requests for approval whose calls come first
    lists      items that come first in the output
    choice     the request's `tool_choice` as a worker knows it; None: none
    shown      fields of the response as the request had them: its own tools and choice
    max_turns  requests to workers
    max_calls  calls of tools
    max_bytes  of one request to a worker
    streams    whether the client wants events
    """

    fields: Mapping[str, Any]
    items: Sequence[Item]
    tools: Mapping[str, Offered]
    approved: Sequence[tuple[Item, Offered]]
    lists: Sequence[Item]
    choice: object
    shown: Mapping[str, Any]
    max_turns: int
    max_calls: int
    max_bytes: int
    streams: bool


class WithTools(Response):
    """The answer to a request with MCP tools. A client that leaves ends it."""

    def __init__(
        self, proxy: Proxy, respond: Respond, request: Request, plan: Plan, on_call: OnCall
    ) -> None:
        self._proxy = proxy
        self._respond = respond
        self._request = request
        self._plan = plan
        self._on_call = on_call
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plan = self._plan
        if not plan.streams:
            answer = await self._made(receive, AtItsEnd())
        else:
            events = EventByEvent(send, plan.tools, plan.lists, plan.shown)
            try:
                answer = await self._made(receive, events)
            except SapwoodError as error:
                if not events.has_begun:
                    raise
                log.warning("a streamed response with tools failed: %s", error.message)
                await events.fail(error)
                return
        if answer is not None:
            await answer(scope, receive, send)

    async def _made(self, receive: Receive, telling: Telling) -> Response | None:
        """What is still to be sent; None: nothing."""
        timeout_s = self._proxy.limits.timeout_s
        watch = ClientWatch(receive, self._proxy)
        turns = _Turns(self._respond, self._request, self._plan, self._on_call, telling)
        try:
            return await turns.run()
        except asyncio.CancelledError:
            if not watch.has_cancelled():
                raise
            if watch.has_left:
                log.debug("the client left; its response with tools is given up")
                self._proxy.metrics.num_left += 1
                return None
            raise GatewayTimeout(
                f"the response was not made within {timeout_s:g} s; ask for less, or start the "
                "gateway with a larger --request-timeout-secs"
            ) from None
        finally:
            watch.close()


@dataclass(slots=True)
class _Turn:
    """What one answer of a worker asks for.

    said     its items that the worker sees again
    results  the outputs of the calls among them
    waits    whether the client has to do something before it can go on
    ignored  whether a call was not made, for lack of turns, calls or an end of the answer
    """

    said: list[Item] = field(default_factory=list)
    results: list[Item] = field(default_factory=list)
    waits: bool = False
    ignored: bool = False


class _Turns:
    def __init__(
        self,
        respond: Respond,
        request: Request,
        plan: Plan,
        on_call: OnCall,
        telling: Telling,
    ) -> None:
        self._respond = respond
        self._request = request
        self._plan = plan
        self._on_call = on_call
        self._telling = telling
        self._items = list(plan.items)
        self._output = list(plan.lists)
        self._num_calls_left = plan.max_calls
        self._usage: Any = None

    async def run(self) -> Response | None:
        """What is still to be sent; None: nothing."""
        plan = self._plan
        for item, tool in plan.approved:
            done, output = await self._call(tool, item, approval_id=item["id"])
            await self._put(done)
            self._items += called(done, output)
        choice = plan.choice
        for turn in range(1, plan.max_turns + 1):
            may_call = turn < plan.max_turns and self._num_calls_left > 0
            answered = await self._ask(choice if may_call else "none")
            told = answered.told
            if told is None:
                return self._telling.refused(answered)
            self._usage = _sum(self._usage, told.get("usage"))
            may_call = may_call and told["status"] == "completed"
            this = await self._act(told["output"], may_call=may_call)
            if this.waits or not this.results:
                return await self._telling.finish(answered, self._shown(told, this))
            self._items += [*this.said, *this.results]
            choice = later_choice(plan.choice)
        raise AssertionError("the last turn calls nothing")

    async def _act(self, items: Sequence[Any], *, may_call: bool) -> _Turn:
        """Make the calls among a worker's items, in their order."""
        this = _Turn()
        for item in items:
            if not isinstance(item, dict):
                raise BadGateway("the worker's answer is no response: an item is no object")
            is_call = item.get("type") == "function_call"
            tool = self._plan.tools.get(str(item.get("name"))) if is_call else None
            if tool is None:
                await self._put(item)
                this.said.append(item)
                this.waits = this.waits or is_call
            elif not may_call or self._num_calls_left < 1:
                id_ = self._telling.id_of(len(self._output))
                await self._put(made_call(tool, item, id_, "incomplete"))
                this.ignored = True
            elif tool.needs_approval:
                await self._put(_to_approve(tool, item))
                this.waits = True
            else:
                done, output = await self._call(tool, item, approval_id=None)
                await self._put(done)
                call, result = called(done, output)
                this.said.append(call)
                this.results.append(result)
        return this

    async def _put(self, item: Item) -> None:
        self._output.append(item)
        await self._telling.done(len(self._output) - 1, item)

    async def _call(
        self, tool: Offered, item: Mapping[str, Any], *, approval_id: str | None
    ) -> tuple[Item, str]:
        """Call the tool: the item for the output, and what the model is told."""
        self._num_calls_left -= 1
        position = len(self._output)
        id_ = self._telling.id_of(position)
        await self._telling.calls(position, made_call(tool, item, id_))
        try:
            arguments = orjson.loads(item.get("arguments") or "{}")
        except (orjson.JSONDecodeError, TypeError):
            arguments = None
        if isinstance(arguments, dict):
            outcome = await tool.connection.call(tool.tool.name, arguments)
        else:
            outcome = Outcome(text="the arguments are no JSON object", is_error=True)
        self._on_call(tool.label, not outcome.is_error)
        made = made_call(tool, item, id_, "failed" if outcome.is_error else "completed")
        made["approval_request_id"] = approval_id
        if outcome.is_error:
            made["error"] = {"type": "mcp_tool_execution_error", "content": outcome.text}
        else:
            made["output"] = outcome.text
        return made, outcome.text

    async def _ask(self, choice: object) -> Answered:
        plan = self._plan
        asked = {**plan.fields, "input": self._items}
        if choice is not None and plan.fields.get("tools"):
            asked["tool_choice"] = choice
        body = orjson.dumps(asked)
        if len(body) > plan.max_bytes:
            raise too_long(plan.max_bytes, "input")
        self._telling.begin_turn(len(self._output))
        sink = self._telling.sink()
        forwarded = self._respond(self._request, body)
        await forwarded(self._request.scope, _stays, sink.send)
        return sink.answered()

    def _shown(self, told: dict[str, Any], last: _Turn) -> dict[str, Any]:
        shown = {**told, **self._plan.shown, "output": self._output, "usage": self._usage}
        if last.ignored and told["status"] == "completed":
            shown["status"] = "incomplete"
            shown["incomplete_details"] = {"reason": "max_tool_calls"}
        return shown


async def _stays() -> Message:
    """The `receive` of a worker's answer: the whole response watches the client."""
    never: NoReturn = await asyncio.get_running_loop().create_future()
    return never


def _to_approve(tool: Offered, item: Mapping[str, Any]) -> Item:
    return {
        "id": new_id("mcpr"),
        "type": "mcp_approval_request",
        "server_label": tool.label,
        "name": tool.tool.name,
        "arguments": item.get("arguments") or "{}",
    }


def _sum(one: Any, other: Any) -> Any:
    """The sum of two usages, number by number."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: _sum(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one + other
    return one if other is None else other


def tool_of(item: Mapping[str, Any], tools: Mapping[str, Offered]) -> Offered | None:
    """The tool that a request for approval is about, if it is offered."""
    name = item.get("name")
    tool = tools.get(function_name(name)) if isinstance(name, str) else None
    if tool is None or tool.tool.name != name or tool.label != item.get("server_label"):
        return None
    return tool
