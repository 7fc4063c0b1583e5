"""The items of MCP tools: what a worker sees of them, and which approvals they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sapwood.base.errors import InvalidRequest
from sapwood.gateway.mcp.tools import function_name
from sapwood.history.interface import Item

_OURS = frozenset({"mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response"})


def is_ours(item: object) -> bool:
    if not isinstance(item, Mapping):
        return False
    kind = item.get("type")
    return isinstance(kind, str) and kind in _OURS


def as_functions(items: Sequence[Item]) -> list[Item]:
    """The items with functions in place of MCP tools: calls with their outputs, and calls that the
    user refused; lists of tools and open approvals are left out."""
    refused = {
        _id(item, "approval_request_id"): item
        for item in items
        if item.get("type") == "mcp_approval_response" and item.get("approve") is False
    }
    found: list[Item] = []
    for item in items:
        kind = item.get("type")
        if kind == "mcp_call" and item.get("status") in ("completed", "failed"):
            found += called(item, _result(item))
        elif kind == "mcp_approval_request" and _id(item, "id") in refused:
            reason = refused[_id(item, "id")].get("reason")
            found += called(
                item, "the user did not allow this call" + (f": {reason}" if reason else "")
            )
        elif not is_ours(item):
            found.append(item)
    return found


def called(item: Mapping[str, Any], output: str) -> list[Item]:
    """A call with its output, as the items of a function's."""
    id_ = _text(item, "id")
    call = {
        "type": "function_call",
        "call_id": id_,
        "name": function_name(_text(item, "name")),
        "arguments": _text(item, "arguments"),
    }
    return [call, {"type": "function_call_output", "call_id": id_, "output": output}]


def approved(earlier: Sequence[Item], new: Sequence[Item]) -> list[Item]:
    """The requests for approval that the new items approve, and whose calls were not made yet.

    Raises InvalidRequest for an answer to a request that is not there
    """
    everything = [*earlier, *new]
    requests = {
        _id(item, "id"): item for item in everything if item.get("type") == "mcp_approval_request"
    }
    made = {
        _id(item, "approval_request_id") for item in everything if item.get("type") == "mcp_call"
    }
    found: dict[str, Item] = {}
    for item in new:
        if item.get("type") != "mcp_approval_response":
            continue
        id_ = _id(item, "approval_request_id")
        if not isinstance(item.get("approve"), bool):
            raise InvalidRequest(
                "approve of an mcp_approval_response must be true or false", param="input"
            )
        if not id_ or id_ not in requests:
            raise InvalidRequest(
                "an mcp_approval_response must name the id of an mcp_approval_request that comes "
                "before it, in the input or in the previous response",
                param="input",
            )
        if item["approve"] and id_ not in made:
            found[id_] = requests[id_]
    return list(found.values())


def _result(item: Item) -> str:
    output, error = item.get("output"), item.get("error")
    if isinstance(output, str):
        return output
    content = error.get("content") if isinstance(error, Mapping) else error
    return content if isinstance(content, str) else "the call failed"


def _id(item: Mapping[str, Any], name: str) -> str:
    """Empty if the item has none: a client may have sent anything."""
    value = item.get(name)
    return value if isinstance(value, str) else ""


def _text(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} of an {item.get('type')} must be a text", param="input")
    return value
