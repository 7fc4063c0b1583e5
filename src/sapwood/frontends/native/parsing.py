"""POST /parse_function_call and /separate_reasoning: the parsers alone, without the model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.base.registry import Registry
from sapwood.frontends.serving.services import Services
from sapwood.frontends.serving.tools import openai_tools
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.schema.fields import FieldTable, parse
from sapwood.text.answer import AnswerShape
from sapwood.text.events import Answer
from sapwood.text.formats import AnswerFormats
from sapwood.text.reasoning.registry import REASONING_FORMATS
from sapwood.text.tools.format import ToolSet
from sapwood.text.tools.registry import TOOL_FORMATS

T = TypeVar("T")


class ParseFunctionCallRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /parse_function_call. tool_call_parser defaults to the server's own."""

    text: str
    tools: list[dict[str, Any]]
    tool_call_parser: str | None = None


class SeparateReasoningRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /separate_reasoning. reasoning_parser defaults to the server's own."""

    text: str
    reasoning_parser: str | None = None


PARSE_CALL_FIELDS = FieldTable(title="POST /parse_function_call", shape=ParseFunctionCallRequest)
SEPARATE_FIELDS = FieldTable(title="POST /separate_reasoning", shape=SeparateReasoningRequest)


async def parse_function_call(request: Request, services: Services) -> Response:
    answer = await parsed_calls(await read_json(request), services.formats)
    return json_response(
        {
            "normal_text": answer.content,
            "calls": [
                {"tool_index": index, "name": call.name, "parameters": call.arguments}
                for index, call in enumerate(answer.calls)
            ],
        }
    )


async def separate_reasoning(request: Request, services: Services) -> Response:
    answer = await parsed_reasoning(await read_json(request), services.formats)
    return json_response({"reasoning_text": answer.reasoning, "text": answer.content})


async def parsed_calls(body: Mapping[str, Any], formats: AnswerFormats) -> Answer:
    """The calls in a request's text, and the rest of it. InvalidRequest, which names the field.

    formats  those of the model, for a request that names no parser
    """
    asked = parse(body, PARSE_CALL_FIELDS)
    tools = openai_tools(asked.tools)
    calls = formats.calls
    if asked.tool_call_parser is not None:
        calls = _found(TOOL_FORMATS, asked.tool_call_parser, "tool_call_parser")()
    if calls is None:
        raise _none_chosen("tool_call_parser")
    tool_set = ToolSet(
        parameters={tool.name: tool.schema for tool in tools},
        keeps_unknown=formats.keeps_unknown,
    )
    # A long text would keep the event loop from others.
    return await asyncio.to_thread(AnswerShape(calls=calls, tools=tool_set).parsed, asked.text)


async def parsed_reasoning(body: Mapping[str, Any], formats: AnswerFormats) -> Answer:
    """A request's text taken apart, as `parsed_calls` does."""
    asked = parse(body, SEPARATE_FIELDS)
    reasoning = formats.reasoning
    if asked.reasoning_parser is not None:
        reasoning = _found(REASONING_FORMATS, asked.reasoning_parser, "reasoning_parser")
    if reasoning is None:
        raise _none_chosen("reasoning_parser")
    shape = AnswerShape(reasoning=reasoning, is_thinking=reasoning.is_forced)
    return await asyncio.to_thread(shape.parsed, asked.text)


def _found(registry: Registry[T], name: str, field: str) -> T:
    if name not in registry.names():
        known = ", ".join(registry.names())
        raise InvalidRequest(f"{field} is {name[:80]!r} but must be one of: {known}", param=field)
    return registry.get(name)


def _none_chosen(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field} is required, since this server has none of its own for the model that it serves",
        param=field,
    )
