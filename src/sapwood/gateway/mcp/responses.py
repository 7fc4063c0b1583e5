"""Requests for responses that have to do with MCP tools."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.gateway.chats import Respond
from sapwood.gateway.exchange import Proxy
from sapwood.gateway.mcp.config import Server
from sapwood.gateway.mcp.connection import Connection, ServerTool
from sapwood.gateway.mcp.items import approved, as_functions, is_ours
from sapwood.gateway.mcp.loop import OnCall, Plan, WithTools, tool_of
from sapwood.gateway.mcp.tools import (
    AskedServer,
    Offered,
    asked_servers,
    first_choice,
    is_mcp,
    listed,
    offered,
)
from sapwood.history.interface import Item, new_id, too_long

MAX_CALLS = 128
"""Of one response; a request's `max_tool_calls` may be less."""
_OWN_FIELDS = frozenset(
    {"previous_response_id", "conversation", "input", "tools", "tool_choice", "max_tool_calls"}
)


class McpTools:
    """The tools of all MCP servers that the gateway was started with.

    max_rounds  how often a worker may go on from the results of calls, in one response
    on_call     is told of each call
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        max_rounds: int,
        timeout_s: float,
        max_result_bytes: int,
        on_call: OnCall,
    ) -> None:
        self._connections = {
            server.name: Connection(server, timeout_s=timeout_s, max_result_bytes=max_result_bytes)
            for server in servers
        }
        self._max_turns = max_rounds + 1
        self._on_call = on_call

    def concerns(self, asked: Mapping[str, Any], earlier: Sequence[Item]) -> bool:
        """Whether the request, or what came before it, has tools or items of MCP servers."""
        tools, given = asked.get("tools"), asked.get("input")
        return (
            any(is_mcp(tool) for tool in _list(tools))
            or any(is_ours(item) for item in _list(given))
            or any(is_ours(item) for item in earlier)
        )

    async def respond(
        self,
        proxy: Proxy,
        answer: Respond,
        request: Request,
        asked: Mapping[str, Any],
        *,
        earlier: Sequence[Item],
        new: Sequence[Item],
        max_bytes: int,
    ) -> Response:
        """The answer to a request that this concerns.

        answer     what answers each turn
        earlier    what came before, as a worker may see it
        new        the request's own input
        max_bytes  of a request to a worker
        """
        tools = _list(asked.get("tools"))
        functions = [tool for tool in tools if not is_mcp(tool)]
        servers = asked_servers(tools, self._connections)
        approvals = approved(earlier, new)
        fields: dict[str, Any] = {
            name: value for name, value in asked.items() if name not in _OWN_FIELDS
        }
        fields["store"] = False
        items = as_functions([*earlier, *new])
        if not servers:
            if approvals:
                raise InvalidRequest(
                    "an approved call needs its MCP server among the request's tools", param="tools"
                )
            ours = ("tools", "tool_choice", "max_tool_calls")
            body = orjson.dumps(
                {**fields, **{k: asked[k] for k in ours if k in asked}, "input": items}
            )
            if len(body) > max_bytes:
                raise too_long(max_bytes, "input")
            return answer(request, body)
        if asked.get("background"):
            raise UnsupportedFeature(
                "background is not offered together with tools of MCP servers; leave it out",
                param="background",
            )
        max_calls = _max_calls(asked.get("max_tool_calls"))
        found = await self._found(servers)
        by_name = offered(found, functions)
        return WithTools(
            proxy,
            answer,
            request,
            Plan(
                fields={
                    **fields,
                    "tools": [*functions, *(tool.function for tool in by_name.values())],
                },
                items=items,
                tools=by_name,
                approved=_with_tools(approvals, by_name),
                lists=_lists(found, [*earlier, *new]),
                choice=first_choice(asked.get("tool_choice"), by_name),
                shown={
                    "tools": tools,
                    "tool_choice": asked.get("tool_choice") or "auto",
                    "max_tool_calls": asked.get("max_tool_calls"),
                },
                max_turns=self._max_turns,
                max_calls=max_calls,
                max_bytes=max_bytes,
                streams=bool(asked.get("stream")),
            ),
            self._on_call,
        )

    async def close(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))

    async def _found(
        self, servers: Sequence[AskedServer]
    ) -> list[tuple[AskedServer, Connection, Sequence[ServerTool]]]:
        connections = [self._connections[server.server_label] for server in servers]
        tools = await asyncio.gather(*(connection.tools() for connection in connections))
        return list(zip(servers, connections, tools, strict=True))


def _list(given: object) -> list[Any]:
    return given if isinstance(given, list) else []


def _max_calls(asked: object) -> int:
    if asked is None:
        return MAX_CALLS
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise InvalidRequest("max_tool_calls must be a whole number >= 1", param="max_tool_calls")
    return min(asked, MAX_CALLS)


def _with_tools(
    approvals: Sequence[Item], tools: Mapping[str, Offered]
) -> list[tuple[Item, Offered]]:
    if len(approvals) > MAX_CALLS:
        raise InvalidRequest(f"at most {MAX_CALLS} calls may be approved at once", param="input")
    found = []
    for item in approvals:
        tool = tool_of(item, tools)
        if tool is None:
            raise InvalidRequest(
                f"the approved call is of {str(item.get('name'))[:80]!r}, which is not among the "
                "tools that this request allows",
                param="tools",
            )
        found.append((item, tool))
    return found


def _lists(
    found: Sequence[tuple[AskedServer, Connection, Sequence[ServerTool]]], before: Sequence[Item]
) -> list[Item]:
    """The lists of tools that the client has not seen yet."""
    seen = [item.get("server_label") for item in before if item.get("type") == "mcp_list_tools"]
    return [
        listed(new_id("mcpl"), connection.name, [tool for tool in tools if asked.allows(tool)])
        for asked, connection, tools in found
        if connection.name not in seen
    ]
