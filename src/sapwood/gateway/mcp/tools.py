"""The MCP servers that a request names, and which of their tools its model may call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.gateway.mcp.connection import Connection, ServerTool
from sapwood.history.interface import Item

_NOT_TAKEN = (
    "server_url",
    "headers",
    "authorization",
    "connector_id",
    "tunnel_id",
    "server_description",
    "allowed_callers",
    "defer_loading",
)
_NO_FUNCTION_CHARS = re.compile(r"[^A-Za-z0-9_-]")


class Filter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names tools, by what all of the given fields say."""

    tool_names: list[str] | None = None
    read_only: bool | None = None

    def matches(self, tool: ServerTool) -> bool:
        return (self.tool_names is None or tool.name in self.tool_names) and (
            self.read_only is None or tool.is_read_only == self.read_only
        )


class _Approval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    always: Filter | None = None
    never: Filter | None = None


class AskedServer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tool of type `mcp` in a request, with the fields of OpenAI's API that are taken here."""

    type: Literal["mcp"]
    server_label: str
    allowed_tools: list[str] | Filter | None = None
    require_approval: Literal["always", "never"] | _Approval | None = None

    def allows(self, tool: ServerTool) -> bool:
        allowed = self.allowed_tools
        if isinstance(allowed, list):
            return tool.name in allowed
        return allowed is None or allowed.matches(tool)

    def needs_approval(self, tool: ServerTool) -> bool:
        """As OpenAI's API: what is not said to need none needs one."""
        rule = self.require_approval
        if not isinstance(rule, _Approval):
            return rule != "never"
        if rule.always is not None and rule.always.matches(tool):
            return True
        return rule.never is None or not rule.never.matches(tool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A tool that the model is offered as a function."""

    connection: Connection
    tool: ServerTool
    needs_approval: bool

    @property
    def label(self) -> str:
        return self.connection.name

    @property
    def function(self) -> dict[str, Any]:
        """The function as a tool of a request for a response."""
        function = {"type": "function", "name": function_name(self.tool.name)}
        if self.tool.description is not None:
            function["description"] = self.tool.description
        return {**function, "parameters": self.tool.schema, "strict": False}


def is_mcp(tool: object) -> bool:
    return isinstance(tool, Mapping) and tool.get("type") == "mcp"


def asked_servers(tools: Sequence[object], known: Mapping[str, Connection]) -> list[AskedServer]:
    """The servers that a request's tools name, each once.

    Raises InvalidRequest
    """
    found: list[AskedServer] = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "mcp":
            continue
        where = f"tools[{index}]"
        for name in _NOT_TAKEN:
            if tool.get(name) is not None:
                raise UnsupportedFeature(
                    f"{where}.{name} is not taken: MCP servers are those that the gateway was "
                    f"started with ({', '.join(known) or 'none'}); name one as server_label",
                    param=f"{where}.{name}",
                )
        told = {name: value for name, value in tool.items() if name not in _NOT_TAKEN}
        try:
            server = msgspec.convert(told, AskedServer)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{where}: {error}", param=where) from None
        if server.server_label not in known:
            raise InvalidRequest(
                f"{where}.server_label is {server.server_label[:80]!r}, but the MCP servers of "
                f"this gateway are {', '.join(known) or 'none'}",
                param=f"{where}.server_label",
            )
        if any(other.server_label == server.server_label for other in found):
            raise InvalidRequest(
                f"{where} names the MCP server {server.server_label!r} again; merge the two",
                param=where,
            )
        found.append(server)
    return found


def offered(
    servers: Sequence[tuple[AskedServer, Connection, Sequence[ServerTool]]],
    functions: Sequence[object],
) -> dict[str, Offered]:
    """Function name -> tool. Raises InvalidRequest if two tools would have one name.

    functions  the client's own
    """
    taken = {tool.get("name") for tool in functions if isinstance(tool, Mapping)}
    found: dict[str, Offered] = {}
    for asked, connection, tools in servers:
        for tool in tools:
            if not asked.allows(tool):
                continue
            name = function_name(tool.name)
            if name in taken or name in found:
                raise InvalidRequest(
                    f"two tools have the name {name!r}, one of them of the MCP server "
                    f"{connection.name!r}; leave one out by allowed_tools",
                    param="tools",
                )
            found[name] = Offered(
                connection=connection, tool=tool, needs_approval=asked.needs_approval(tool)
            )
    return found


def first_choice(choice: object, tools: Mapping[str, Offered]) -> object:
    """The request's `tool_choice` for a worker, which knows functions only."""
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "mcp":
        label, name = choice.get("server_label"), choice.get("name")
        chosen = [
            {"type": "function", "name": function}
            for function, tool in tools.items()
            if tool.label == label and name in (None, tool.tool.name)
        ]
        if not chosen:
            raise InvalidRequest("tool_choice names no tool of the request", param="tool_choice")
        if name is not None:
            return chosen[0]
        return {"type": "allowed_tools", "mode": "required", "tools": chosen}
    allowed = choice.get("tools")
    if isinstance(allowed, list) and any(is_mcp(tool) for tool in allowed):
        raise UnsupportedFeature(
            "tool_choice of type allowed_tools can name functions only; name an MCP server's tools "
            "by allowed_tools of the server",
            param="tool_choice.tools",
        )
    return choice


def later_choice(choice: object) -> object:
    """The choice after the first calls: one that asks for a call would never end."""
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return {**choice, "mode": "auto"}
    return choice if choice in (None, "none") else "auto"


def function_name(name: str) -> str:
    """A tool's name as a function may have it."""
    return _NO_FUNCTION_CHARS.sub("_", name)[:64]


def listed(id_: str, label: str, tools: Sequence[ServerTool]) -> Item:
    """The item that tells a client what tools there are."""
    return {
        "id": id_,
        "type": "mcp_list_tools",
        "server_label": label,
        "tools": [
            {
                "name": tool.name,
                "description": tool.description,
                "input_schema": tool.schema,
                "annotations": {"read_only": tool.is_read_only},
            }
            for tool in tools
        ],
        "error": None,
    }
