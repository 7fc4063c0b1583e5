"""Tools, calls and results as plain text, where the chat template has no place for them.

A text at the beginning lists the tools and says how to call them. Calls of earlier turns are
spelled as that text says, within the assistant's message. Results stand in messages of the user.
So any template renders any conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from sapwood.base.errors import InvalidRequest
from sapwood.schema.media_source import KINDS
from sapwood.text.template import SYSTEM_ROLES, Message, check_messages, text_of_parts
from sapwood.text.tools.generic import BEGIN, END

_RESULT_ROLES = ("tool", "function")

_CALL_HELP = f"""\
To call functions, write a list of calls like this one, and nothing else:
{BEGIN}[{{"name": "function name", "arguments": {{"parameter name": "value"}}}}]{END}"""

_ANSWER_HELP = """\
The next message tells you what they returned. If no function helps, answer the user in plain \
words."""


def spelled_out(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    in_system: bool,
    parallel: bool = True,
) -> list[Message]:
    """The messages without calls, results and tools, which are text in them now.

    tools      as in OpenAI's API: {"type": "function", "function": {…}}
    in_system  the text stands in the system message; else before the user's first message, for
               templates that show no system message
    parallel   the model may call several functions at once
    Raises     InvalidRequest for calls and results that cannot be spelled
    """
    check_messages(messages)
    spelled = _with_calls_spelled(messages)
    if not tools:
        return spelled
    text = tools_text(tools, parallel=parallel)
    return _in_system(text, spelled) if in_system else _before_user(text, spelled)


def tools_text(tools: Sequence[Mapping[str, Any]], *, parallel: bool = True) -> str:
    listed = "\n".join(_json(tool.get("function"), "tools") for tool in tools)
    limit = "" if parallel else "\nCall only one function at a time."
    return (
        f"You can call functions to help the user:\n<tools>\n{listed}\n</tools>\n\n"
        f"{_CALL_HELP}{limit}\n{_ANSWER_HELP}"
    )


def _in_system(text: str, messages: list[Message]) -> list[Message]:
    first = messages[0]
    if first["role"] not in SYSTEM_ROLES:
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": _joined([first.get("content"), text])}, *messages[1:]]


def _before_user(text: str, messages: list[Message]) -> list[Message]:
    for position, message in enumerate(messages):
        if message["role"] == "user":
            told = {**message, "content": _joined([text, message.get("content")])}
            return [*messages[:position], told, *messages[position + 1 :]]
    return [{"role": "user", "content": text}, *messages]


def _with_calls_spelled(messages: Sequence[Message]) -> list[Message]:
    spelled: list[Message] = []
    names: dict[str, str] = {}
    numbered = enumerate(messages)
    for is_told, group in groupby(numbered, key=lambda pair: _is_told(pair[1])):
        run = list(group)
        if not is_told:
            spelled += [_said(message, i, names) for i, message in run]
        elif all(message["role"] == "user" for _, message in run):
            spelled += [message for _, message in run]
        else:
            # One message, because many templates insist on roles in turn.
            contents = [
                _result(message, i, names)
                if message["role"] in _RESULT_ROLES
                else message.get("content")
                for i, message in run
            ]
            spelled.append({"role": "user", "content": _joined(contents)})
    return spelled


def _is_told(message: Message) -> bool:
    """Whether the model was told it, as its user's words or as a tool's result."""
    return message["role"] == "user" or message["role"] in _RESULT_ROLES


def _said(message: Message, position: int, names: dict[str, str]) -> Message:
    """The message with its calls as text; `names` gets the name of the function of each call."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    where = f"messages[{position}].tool_calls"
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidRequest(f"{where} must be a list of calls", param=where)
    texts = [_call(call, f"{where}[{i}]", names) for i, call in enumerate(calls)]
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    text = f"{BEGIN}[{', '.join(texts)}]{END}"
    return {**others, "content": _joined([message.get("content"), text], by="\n")}


def _call(call: Any, where: str, names: dict[str, str]) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not name:
        raise InvalidRequest(
            f'{where} must be a call such as {{"id": "1", "type": "function", "function": '
            '{"name": "f", "arguments": "{}"}}',
            param=where,
        )
    if isinstance(call.get("id"), str):
        names[call["id"]] = str(name)
    arguments = function.get("arguments")
    # Text goes in as the model wrote it, even if it is no JSON.
    text = arguments.strip() if isinstance(arguments, str) else _json(arguments or {}, where)
    return f'{{"name": {_json(name, where)}, "arguments": {text or "{}"}}}'


def _result(
    message: Message, position: int, names: Mapping[str, str]
) -> str | list[dict[str, Any]]:
    content = message.get("content")
    parts: list[Any] = []
    if isinstance(content, list):
        # Pictures stay parts of the message; a list of texts is one text.
        shown = any(isinstance(part, Mapping) and part.get("type") in KINDS for part in content)
        parts, content = (content, "") if shown else ([], text_of_parts(content))
    elif content is not None and not isinstance(content, str):
        content = _json(content, f"messages[{position}].content")
    call_id = message.get("tool_call_id")
    name = message.get("name") or (names.get(call_id) if isinstance(call_id, str) else None)
    # In plain words: the smallest models repeat tags instead of answering.
    text = f"The function {f'{name} ' if name else ''}returned:\n{content or ''}"
    return [{"type": "text", "text": text}, *parts] if parts else text


def _joined(contents: Iterable[Any], *, by: str = "\n\n") -> Any:
    """One content of several: a text, or a list of parts if one of them is."""
    present = [content for content in contents if content]
    if all(isinstance(content, str) for content in present):
        return by.join(present)
    parts: list[Any] = []
    for content in present:
        if parts:
            parts.append({"type": "text", "text": by})
        parts += content if isinstance(content, list) else [{"type": "text", "text": str(content)}]
    return parts


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{where} cannot be written as JSON: {type(error).__name__}: {error}", param=where
        ) from error
