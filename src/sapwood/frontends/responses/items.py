"""The items of a conversation: their checks, and their translation to a chat's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.responses.protocol import (
    CALL_FIELDS,
    CALL_OUTPUT_FIELDS,
    IMAGE_PART_FIELDS,
    MESSAGE_FIELDS,
    PART_FIELDS,
    REASONING_ITEM_FIELDS,
)
from sapwood.frontends.serving.media import Piece, content_of
from sapwood.history.interface import Item, new_id
from sapwood.schema.fields import parse
from sapwood.schema.unsupported import refuse

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}


def input_items(given: str | Sequence[Mapping[str, Any]]) -> list[Item]:
    """The items in the form in which they are kept: checked, and each with a type and an id."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_checked(item, f"input[{i}]") for i, item in enumerate(given)]


def to_messages(items: Sequence[Item], instructions: str) -> list[dict[str, Any]]:
    """A chat's messages. An assistant's thinking, text and calls in a row become one message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": [instructions]})
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            output = item["output"]
            content = [output] if isinstance(output, str) else _shown(output)
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        elif kind == "message" and item["role"] != "assistant":
            _add_told(messages, item)
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            _add_said(messages[-1], item)
    return [_with_texts(message) for message in messages]


def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its lists of texts joined.

    At the end, because joining each text to all before it costs the square of their number."""
    if message["role"] == "assistant" and "tool_calls" not in message:
        message.setdefault("content", [])
    between = "\n\n" if message["role"] == "system" else ""
    joined = {
        name: content_of(message[name], joined_by=between)
        for name in ("content", "reasoning_content")
        if name in message
    }
    return message | joined


def _add_told(messages: list[dict[str, Any]], item: Item) -> None:
    role = "user" if item["role"] == "user" else "system"
    content = _shown(item["content"])
    # Most templates take a system message only as the first one, and only once.
    if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
        messages[0]["content"] += content
    else:
        messages.append({"role": role, "content": content})


def _add_said(message: dict[str, Any], item: Item) -> None:
    if item["type"] == "reasoning":
        message.setdefault("reasoning_content", []).append(_joined(item["content"]))
    elif item["type"] == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)
    else:
        message.setdefault("content", []).append(_joined(item["content"]))


def _shown(content: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """The texts, joined, and the pictures between them as a chat's parts."""
    shown: list[Piece] = []
    for part in content:
        if part.get("type") == "input_image":
            url = {"url": part["image_url"], "detail": part["detail"]}
            shown.append({"type": "image_url", "image_url": url})
        elif shown and isinstance(shown[-1], str):
            shown[-1] += _joined([part])
        else:
            shown.append(_joined([part]))
    return shown or [""]


def _joined(content: Sequence[Mapping[str, Any]]) -> str:
    return "".join(part.get("text") or part.get("refusal") or "" for part in content)


def _checked(given: Any, where: str) -> Item:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} must be an object", param=where)
    kind = given.get("type") or "message"
    item: Item
    if kind == "message":
        message = parse(given, MESSAGE_FIELDS, where=where)
        kept_as = "output_text" if message.role == "assistant" else "input_text"
        content = _parts(message.content, f"{where}.content", kept_as)
        item = {"role": message.role, "content": content}
    elif kind == "function_call":
        call = parse(given, CALL_FIELDS, where=where)
        item = {"call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    elif kind == "function_call_output":
        output = parse(given, CALL_OUTPUT_FIELDS, where=where)
        is_text = isinstance(output.output, str)
        kept = output.output if is_text else _parts(output.output, f"{where}.output", "input_text")
        item = {"call_id": output.call_id, "output": kept}
    elif kind == "reasoning":
        reasoning = parse(given, REASONING_ITEM_FIELDS, where=where)
        if reasoning.encrypted_content and not reasoning.content:
            refuse(
                UnsupportedFeature(
                    f"{where}.encrypted_content can only be read by OpenAI's servers; send the "
                    "item's content, or leave the item out",
                    param=f"{where}.encrypted_content",
                )
            )
        content = _parts(reasoning.content, f"{where}.content", "reasoning_text")
        item = {"summary": [], "content": content}
    else:
        raise UnsupportedFeature(
            f"{where} is of type {str(kind)[:40]!r}, but this server takes only items of type "
            f"{', '.join(_PREFIXES)}",
            param=where,
        )
    # A client's own id could be another item's in the store, so the server makes one.
    return {"type": kind, "id": new_id(_PREFIXES[kind]), **item, "status": "completed"}


def _parts(content: str | Sequence[Any], where: str, kept_as: str) -> list[dict[str, Any]]:
    """The content as a list of parts, whose texts have the type `kept_as`."""
    extra: dict[str, Any] = {"annotations": []} if kept_as == "output_text" else {}
    parts: list[dict[str, Any]] = []
    if isinstance(content, str):
        return [{"type": kept_as, "text": content, **extra}]
    for i, part in enumerate(content):
        path = f"{where}[{i}]"
        is_picture = isinstance(part, Mapping) and part.get("type") == "input_image"
        if is_picture and kept_as == "input_text":
            parts.append(_picture(part, path))
        else:
            parts.append({"type": kept_as, "text": _text(part, path), **extra})
    return parts


def _picture(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    part = parse(given, IMAGE_PART_FIELDS, where=where)
    if not part.image_url:
        raise InvalidRequest(
            f"{where}.image_url is required, an http, https or data URL", param=f"{where}.image_url"
        )
    # A conversation that is kept goes on with its pictures, so their data is kept too.
    return {"type": "input_image", "image_url": part.image_url, "detail": part.detail}


def _text(given: Any, where: str) -> str:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} must be an object", param=where)
    kind = given.get("type")
    if isinstance(kind, str) and kind in ("input_image", "input_file", "input_audio"):
        raise UnsupportedFeature(
            f"{where} is of type {kind!r}, which this server does not take there; it takes text, "
            "and in input and in the outputs of functions input_image",
            param=where,
        )
    part = parse(given, PART_FIELDS, where=where)
    return part.text or part.refusal
