"""Anthropic's system text, messages, tools and thinking to one turn of a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.anthropic.protocol import (
    CHOICE_FIELDS,
    FORMAT_FIELDS,
    IMAGE_FIELDS,
    IMAGE_SOURCE_FIELDS,
    OUTPUT_FIELDS,
    REDACTED_FIELDS,
    TEXT_FIELDS,
    THINKING_BLOCK_FIELDS,
    THINKING_FIELDS,
    TOOL_FIELDS,
    TOOL_RESULT_FIELDS,
    TOOL_USE_FIELDS,
    TURN_FIELDS,
    CountTokensRequest,
)
from sapwood.frontends.serving import chat
from sapwood.frontends.serving.media import MediaParts, Piece, content_of
from sapwood.frontends.serving.services import Services
from sapwood.frontends.serving.tools import Tool, ToolUse, checked_tools, named_tool
from sapwood.schema.fields import parse
from sapwood.schema.grammar import Grammar, json_schema
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.unsupported import refuse

Message = dict[str, Any]

_INSTEAD = "use /v1/completions, which takes a plain prompt"


def to_turn(asked: CountTokensRequest, services: Services, sampling: SamplingParams) -> chat.Turn:
    """The request as a conversation, ready for the engine.

    Raises InvalidRequest or UnsupportedFeature, which name the field.
    """
    media = MediaParts(services.media_markers)
    messages = to_messages(asked, media)
    goes_on = bool(messages) and messages[-1]["role"] == "assistant"
    thinks, insists, budget = _thinking(asked.thinking)
    output = parse(asked.output_config, OUTPUT_FIELDS, where="output_config")
    grammar = _grammar(asked, output.format)
    if grammar is not None:
        sampling = msgspec.structs.replace(sampling, grammar=grammar)
    conversation = chat.Conversation(
        messages=messages,
        media=media.sources,
        tools=_tool_use(asked),
        goes_on=goes_on,
        goes_on_unasked=goes_on,
        thinks=thinks,
        insists_on_thinking=insists,
        effort=output.effort if _knows_effort(services) else None,
        thinking_budget=budget,
        thinking_field="thinking",
        budget_field="thinking.budget_tokens",
    )
    return chat.plan_turn(services, conversation, sampling, instead=_INSTEAD)


def to_messages(asked: CountTokensRequest, media: MediaParts) -> list[Message]:
    """Messages as a template takes them; neighbours of one role are one message.

    Texts and merged messages are joined by line breaks, like paragraphs; but the texts of an
    assistant's message are pieces of one text, and are joined without anything in between. The
    result of a tool becomes a message of its own. `media` takes the pictures.
    """
    messages: list[Message] = []
    system = _text(asked.system, "system", joined_by="\n")
    # Without a turn there is nothing to answer; the template then refuses an empty list.
    if system and asked.messages:
        messages.append({"role": "system", "content": [system]})
    for position, given in enumerate(asked.messages):
        where = f"messages[{position}]"
        turn = parse(given, TURN_FIELDS, where=where)
        where += ".content"
        if turn.role == "assistant":
            messages.append(_said(turn.content, where))
        elif turn.role == "user":
            messages += _told(turn.content, where, media)
        else:
            text = _text(turn.content, where, joined_by="\n")
            messages.append({"role": "system", "content": [text]})
    return _merged(messages)


def _merged(messages: Sequence[Message]) -> list[Message]:
    """messages: the content of each a list of texts and pictures"""
    merged: list[Message] = []
    pieces: list[list[Piece]] = []
    for message in messages:
        last = merged[-1] if merged else None
        is_same = last is not None and last["role"] == message["role"] != "tool"
        if last is None or not is_same or "tool_calls" in last:
            merged.append(message)
            pieces.append(list(message["content"]))
        else:
            # Joined at the end: joining each to all before it costs the square of their number.
            pieces[-1] += message["content"]
            for name in ("tool_calls", "reasoning_content"):
                if name in message:
                    last[name] = message[name]
    for message, content in zip(merged, pieces, strict=True):
        message["content"] = content_of(content, joined_by="\n")
    return merged


def _said(content: str | Sequence[dict[str, Any]], where: str) -> Message:
    """The assistant's message: its thinking, text and tool calls."""
    if isinstance(content, str):
        return {"role": "assistant", "content": [content]}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        path = f"{where}[{i}]"
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(parse(block, THINKING_BLOCK_FIELDS, where=path).thinking)
        elif kind == "redacted_thinking":
            # Encrypted for Anthropic's servers, so that nobody here can read the block.
            parse(block, REDACTED_FIELDS, where=path)
        elif kind == "tool_use":
            call = parse(block, TOOL_USE_FIELDS, where=path)
            arguments = json.dumps(call.input, ensure_ascii=False)
            function = {"name": call.name, "arguments": arguments}
            calls.append({"id": call.id, "type": "function", "function": function})
        else:
            texts.append(_block(block, path))
    message: Message = {"role": "assistant", "content": ["".join(texts)]}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _told(content: str | Sequence[dict[str, Any]], where: str, media: MediaParts) -> list[Message]:
    """The user's text and pictures and the results of tools, as messages in their order."""
    if isinstance(content, str):
        return [{"role": "user", "content": [content]}]
    messages: list[Message] = []
    for i, block in enumerate(content):
        path = f"{where}[{i}]"
        if block.get("type") == "tool_result":
            result = parse(block, TOOL_RESULT_FIELDS, where=path)
            found = _pieces(result.content, f"{path}.content", media)
            # Templates have no other place to say so.
            if result.is_error:
                first = found[0] if found and isinstance(found[0], str) else ""
                found = [f"Error: {first}", *(found[1:] if first else found)]
            messages.append({"role": "tool", "tool_call_id": result.tool_use_id, "content": found})
        else:
            messages.append({"role": "user", "content": [_piece(block, path, media)]})
    return messages or [{"role": "user", "content": [""]}]


def _pieces(content: str | list[dict[str, Any]], where: str, media: MediaParts) -> list[Piece]:
    if isinstance(content, str):
        return [content]
    return [_piece(block, f"{where}[{i}]", media) for i, block in enumerate(content)]


def _piece(given: dict[str, Any], where: str, media: MediaParts) -> Piece:
    if given.get("type") != "image":
        return _block(given, where)
    block = parse(given, IMAGE_FIELDS, where=where)
    source = parse(block.source, IMAGE_SOURCE_FIELDS, where=f"{where}.source")
    if source.type == "url":
        return media.add("image", where, url=source.url)
    # As a data URL it can name nothing but itself, whatever the data are.
    url = f"data:{source.media_type};base64,{source.data}" if source.data else ""
    return media.add("image", where, url=url)


def _text(content: str | list[dict[str, Any]], where: str, *, joined_by: str) -> str:
    if isinstance(content, str):
        return content
    return joined_by.join(_block(block, f"{where}[{i}]") for i, block in enumerate(content))


def _block(given: dict[str, Any], where: str) -> str:
    kind = given.get("type")
    if isinstance(kind, str) and kind != "text":
        raise UnsupportedFeature(
            f"{where} is of type {kind!r}, which this server does not take there; it takes text, "
            "thinking and tool_use of the assistant, and text, image and tool_result of the user",
            param=where,
        )
    return parse(given, TEXT_FIELDS, where=where).text


def _tool_use(asked: CountTokensRequest) -> ToolUse:
    given = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(asked.tools)]
    tools = checked_tools([tool for tool in given if tool is not None])
    if not asked.tool_choice:
        return ToolUse(tools=tools)
    choice = parse(asked.tool_choice, CHOICE_FIELDS, where="tool_choice")
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name is required", param="tool_choice.name")
        return named_tool(tools, choice.name, parallel=parallel)
    if choice.type == "any":
        if not tools:
            raise InvalidRequest("tool_choice needs tools to choose from", param="tool_choice")
        return ToolUse(tools=tools, choice="required", parallel=parallel)
    return ToolUse(tools=tools, choice=choice.type, parallel=parallel)


def _tool(given: dict[str, Any], where: str) -> Tool | None:
    """The tool; None if it is one of those that the server leaves out where it only warns."""
    kind = given.get("type")
    if isinstance(kind, str) and kind != "custom":
        refuse(
            UnsupportedFeature(
                f"{where} is of type {kind[:40]!r}, but this server takes only tools of type "
                "'custom', which the client runs",
                param=where,
            )
        )
        return None
    tool = parse(given, TOOL_FIELDS, where=where)
    return Tool(
        name=tool.name,
        description=tool.description,
        parameters=tool.input_schema,
        strict=tool.strict,
    )


def _knows_effort(services: Services) -> bool:
    """Effort says how much to think and not whether, so it turns no switch of other templates."""
    template = services.template
    return template is not None and "reasoning_effort" in template.variables


def _grammar(asked: CountTokensRequest, given: dict[str, Any] | None) -> Grammar | None:
    """given: output_config.format"""
    if given is not None and asked.output_format is not None and given != asked.output_format:
        raise InvalidRequest(
            "output_format is an older name of output_config.format, but their values differ; "
            "send one of them",
            param="output_format",
        )
    where = "output_config.format" if given is not None else "output_format"
    given = given if given is not None else asked.output_format
    if given is None:
        return None
    schema = parse(given, FORMAT_FIELDS, where=where).schema
    return json_schema(schema, param=f"{where}.schema")


def _thinking(given: dict[str, Any]) -> tuple[bool | None, bool, int | None]:
    """(whether the model should think, whether an answer without is none, tokens of thinking at
    most); None where the model may choose."""
    if not given:
        return None, False, None
    fields = parse(given, THINKING_FIELDS, where="thinking")
    if fields.budget_tokens is not None and fields.type != "enabled":
        raise InvalidRequest(
            f"thinking.budget_tokens is only for type 'enabled', not {fields.type!r}",
            param="thinking.budget_tokens",
        )
    return fields.type != "disabled", fields.type == "enabled", fields.budget_tokens
