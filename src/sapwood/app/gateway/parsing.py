"""The parsers alone, at the gateway: the engines' code with the names of SGLang's gateway.

Source: parity with SGLang's gateway, whose answers these are.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.native.parsing import parsed_calls, parsed_reasoning
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import json_response
from sapwood.text.formats import AnswerFormats


def parsing_dialect(formats: AnswerFormats) -> Dialect:
    """formats: those of requests that name no parser"""
    dialect = Dialect("parsing")

    def admin(path: str) -> Endpoint:
        return Endpoint(paths=(path,), methods=("POST",), access="admin", is_documented=False)

    @dialect.serves(admin("/parse/function_call"))
    async def parse_function_call(request: Request) -> Response:
        body = _renamed(await read_json(request), "tool_call_parser")
        answer = await parsed_calls(body, formats)
        calls = [
            {"function": {"name": call.name, "arguments": call.arguments}} for call in answer.calls
        ]
        return json_response(
            {"remaining_text": answer.content, "tool_calls": calls, "success": True}
        )

    @dialect.serves(admin("/parse/reasoning"))
    async def parse_reasoning(request: Request) -> Response:
        body = _renamed(await read_json(request), "reasoning_parser")
        answer = await parsed_reasoning(body, formats)
        return json_response(
            {"normal_text": answer.content, "reasoning_text": answer.reasoning, "success": True}
        )

    return dialect


def _renamed(body: dict[str, Any], name: str) -> dict[str, Any]:
    """The request with its `parser`, the short name, under the engines' name for it."""
    if "parser" not in body:
        return body
    if body.get(name) is not None:
        raise InvalidRequest(f"parser and {name} mean the same; send only one", param="parser")
    return {**{key: value for key, value in body.items() if key != "parser"}, name: body["parser"]}
