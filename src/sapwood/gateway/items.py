"""The items of responses and conversations: as clients bring them, as they are kept, as workers
get them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sapwood.base.errors import InvalidRequest
from sapwood.history.interface import Item, new_id

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "mcp_list_tools": "mcpl",
    "mcp_call": "mcp",
    "mcp_approval_request": "mcpr",
    "mcp_approval_response": "mcpa",
}
_ID = re.compile(r"[!-~]{1,200}")


def input_items(given: object, where: str = "input") -> list[Item]:
    """The items as they are kept: each has a type, and an id of the gateway's own.

    given   a text, a list of items, or None for no input
    Raises  InvalidRequest
    """
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    if not isinstance(given, list):
        raise InvalidRequest(f"{where} must be a text or a list of items", param=where)
    return [_kept(item, f"{where}[{i}]") for i, item in enumerate(given)]


def output_items(given: Sequence[Any]) -> list[Item]:
    """A worker's items, each with an id that any store can keep."""
    items: list[Item] = []
    for item in given:
        if not isinstance(item, dict):
            raise TypeError("an item of the output is no object")
        id_ = item.get("id")
        is_usable = isinstance(id_, str) and _ID.fullmatch(id_)
        items.append(item if is_usable else {**item, "id": new_id(_prefix(item))})
    return items


def for_worker(items: Sequence[Item]) -> list[Item]:
    """The items without the ids that the gateway made up: a service that keeps items itself would
    look for them. What a model said keeps its id."""
    return [
        {name: value for name, value in item.items() if name != "id"} if _is_told(item) else item
        for item in items
    ]


def is_item_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def _is_told(item: Item) -> bool:
    if item["type"] == "message":
        return bool(item.get("role") != "assistant")
    return bool(item["type"] == "function_call_output")


def _kept(given: object, where: str) -> Item:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} must be an object", param=where)
    kind = given.get("type") or "message"
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type must be a text", param=f"{where}.type")
    item: Item = {**given, "type": kind}
    # A client's own id could be another item's.
    item["id"] = new_id(_prefix(item))
    content = item.get("content")
    if kind == "message" and isinstance(content, str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        item["content"] = [{"type": part, "text": content}]
    return item


def _prefix(item: Mapping[str, Any]) -> str:
    kind = item.get("type")
    return _PREFIXES.get(kind, "item") if isinstance(kind, str) else "item"
