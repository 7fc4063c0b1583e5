"""Which parts of a conversation a chat template shows, found by rendering small conversations.

That a template mentions tools says little: it may read them from a field of its own, show them only
beside a system message, or raise an error. So we look for the name of a tool in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sapwood.base.errors import InvalidRequest

Message = Mapping[str, Any]
Render = Callable[[list[Message], list[Message] | None], str]
"""(messages, tools) -> the prompt; InvalidRequest if the template raises an error."""

_NAME = "sapwood_probe_tool"
_TOOL: Message = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Says whether tools are shown",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city"}},
            "required": ["city"],
        },
    },
}
_SYSTEM_TEXT = "sapwood probe of the system message"
_USER: Message = {"role": "user", "content": "Hello"}
_SYSTEM: Message = {"role": "system", "content": _SYSTEM_TEXT}


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePlaces:
    """
    tools              it shows the tools of a request
    tools_need_system  it does so only if the messages begin with a system message
    system             it shows the text of a system message at the beginning
    """

    tools: bool
    tools_need_system: bool
    system: bool


def places_of(render: Render, *, mentions_tools: bool) -> TemplatePlaces:
    """mentions_tools decides about a template that refuses all of the conversations tried here."""
    alone = _shows_tools(render, [_USER])
    beside_system = _shows_tools(render, [_SYSTEM, _USER])
    if alone is None and beside_system is None:
        return TemplatePlaces(tools=mentions_tools, tools_need_system=False, system=True)
    # A request may always be given a system message, but its own cannot be taken away.
    has_place = bool(alone) if beside_system is None else beside_system
    return TemplatePlaces(
        tools=has_place,
        tools_need_system=has_place and not alone,
        system=_shows_system(render),
    )


def _shows_tools(render: Render, messages: list[Message]) -> bool | None:
    """None if the template refuses these messages without tools, too."""
    try:
        return _NAME in render(messages, [_TOOL])
    except InvalidRequest:
        return None if _refuses(render, messages) else False


def _shows_system(render: Render) -> bool:
    try:
        return _SYSTEM_TEXT in render([_SYSTEM, _USER], None)
    except InvalidRequest:
        return False


def _refuses(render: Render, messages: list[Message]) -> bool:
    try:
        render(messages, None)
    except InvalidRequest:
        return True
    return False
