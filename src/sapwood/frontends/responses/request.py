"""A request for a response -> the body of a streamed chat completion, and the response's head."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.responses.items import to_messages
from sapwood.frontends.responses.protocol import (
    INCLUDED_ANYWAY,
    LOGPROBS,
    PASSED_ON,
    REASONING_FIELDS,
    TEXT_FIELDS,
    TOOL_FIELDS,
    ResponsesRequest,
)
from sapwood.frontends.serving.services import Services
from sapwood.history.interface import Item, Record
from sapwood.http.in_process import Refused
from sapwood.schema.fields import parse
from sapwood.schema.unsupported import refuse

NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}
"""A chat's fields -> the names that a client of the Responses API knows."""


def chat_body(asked: ResponsesRequest, items: Sequence[Item], response_id: str) -> dict[str, Any]:
    """The body of the chat completion that answers the request.

    items   the whole conversation
    Raises  InvalidRequest or UnsupportedFeature
    """
    body: dict[str, Any] = {
        "model": asked.model,
        "messages": to_messages(items, asked.instructions),
        "stream": True,
        "stream_options": {"include_usage": True},
        "rid": response_id,
    }
    empty = ResponsesRequest()
    for name in PASSED_ON:
        value = getattr(asked, name)
        if value != getattr(empty, name):
            body[name] = msgspec.to_builtins(value, str_keys=True)
    if asked.max_output_tokens is not None:
        body["max_completion_tokens"] = asked.max_output_tokens
    if asked.tools:
        tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(asked.tools)]
        body["tools"] = [tool for tool in tools if tool is not None]
        body["tool_choice"] = _tool_choice(asked.tool_choice)
    elif asked.tool_choice not in ("auto", "none"):
        raise InvalidRequest("tool_choice needs tools to choose from", param="tool_choice")
    response_format = _response_format(asked)
    if response_format is not None:
        body["response_format"] = response_format
    effort = parse(asked.reasoning, REASONING_FIELDS, where="reasoning").effort
    if effort is not None:
        body["reasoning_effort"] = effort
    if has_logprobs(asked):
        body |= {"logprobs": True, "top_logprobs": asked.top_logprobs}
    return body


def has_logprobs(asked: ResponsesRequest) -> bool:
    """Whether `include` asks for log probabilities; InvalidRequest for an unknown entry."""
    for name in asked.include:
        if name != LOGPROBS and name not in INCLUDED_ANYWAY:
            known = ", ".join(sorted({LOGPROBS, *INCLUDED_ANYWAY}))
            refuse(
                UnsupportedFeature(
                    f"include has {name[:80]!r} but may only have: {known}", param="include"
                )
            )
    wanted = LOGPROBS in asked.include
    if asked.top_logprobs and not wanted:
        raise InvalidRequest(
            f"top_logprobs needs {LOGPROBS!r} in include, or they would not be shown",
            param="top_logprobs",
        )
    return wanted


def head(
    asked: ResponsesRequest, services: Services, response_id: str, *, is_stored: bool
) -> Record:
    """The response at its beginning, without any output."""
    defaults = services.default_sampling
    temperature, top_p = asked.temperature, asked.top_p
    parallel = asked.parallel_tool_calls
    return {
        "id": response_id,
        "object": "response",
        "created_at": time.time(),
        "completed_at": None,
        "status": "in_progress",
        "background": asked.background,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions or None,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata,
        "model": services.model_name,
        "output": [],
        "parallel_tool_calls": True if parallel is None else parallel,
        "previous_response_id": asked.previous_response_id,
        "reasoning": {"effort": asked.reasoning.get("effort"), "summary": None},
        "store": is_stored,
        "temperature": defaults.get("temperature", 1.0) if temperature is None else temperature,
        "text": {"format": asked.text.get("format") or {"type": "text"}},
        "tool_choice": asked.tool_choice,
        "tools": [
            {"strict": None, "parameters": None, **tool}
            for tool in asked.tools
            if tool.get("type") == "function"
        ],
        "top_logprobs": asked.top_logprobs,
        "top_p": defaults.get("top_p", 1.0) if top_p is None else top_p,
        "truncation": asked.truncation,
        "usage": None,
        "user": asked.user,
        "safety_identifier": asked.safety_identifier,
        "prompt_cache_key": asked.prompt_cache_key,
        "service_tier": "default",
    }


def in_our_words(error: Refused) -> Refused:
    """The chat's refusal, but with the field names of the Responses API."""
    for name, ours in NAMES.items():
        error.message = error.message.replace(name, ours)
        if error.param is not None:
            error.param = error.param.replace(name, ours)
    return error


def _tool(given: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The tool in a chat's form; None if it is one of those that the server leaves out where it
    only warns."""
    kind = given.get("type")
    if isinstance(kind, str) and kind != "function":
        refuse(
            UnsupportedFeature(
                f"{where} is of type {kind[:40]!r}, but this server runs no tools itself; it takes "
                "only tools of type 'function', which the client runs",
                param=where,
            )
        )
        return None
    tool = parse(given, TOOL_FIELDS, where=where)
    function: dict[str, Any] = {"name": tool.name}
    for name in ("description", "parameters", "strict"):
        value = getattr(tool, name)
        if value is not None:
            function[name] = value
    return {"type": "function", "function": function}


def _tool_choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, str):
        return choice
    name = choice.get("name")
    if choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        tools = [_nested_name(one) for one in listed] if isinstance(listed, list) else listed
        allowed = {"mode": choice.get("mode"), "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    if choice.get("type") != "function" or not isinstance(name, str):
        refuse(
            UnsupportedFeature(
                'tool_choice must be "auto", "none", "required", {"type": "function", "name": …} '
                'or {"type": "allowed_tools", …}',
                param="tool_choice",
            )
        )
        return "auto"
    return {"type": "function", "function": {"name": name}}


def _nested_name(chosen: Any) -> Any:
    """The chosen function as a chat's tool_choice has it; other things as they are."""
    if not isinstance(chosen, Mapping) or chosen.get("type") != "function":
        return chosen
    return {"type": "function", "function": {"name": chosen.get("name")}}


def _response_format(asked: ResponsesRequest) -> dict[str, Any] | None:
    """A chat's response_format for `text.format`, which has the same fields without nesting."""
    given = parse(asked.text, TEXT_FIELDS, where="text").format
    kind = given.get("type", "text")
    if kind == "text":
        return None
    if kind != "json_schema":
        return given
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in given.items() if name != "type"},
    }
