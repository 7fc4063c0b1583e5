"""Kimi K2: the model numbers its calls itself, and wants to see its numbers again.

<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}
<|tool_call_end|><|tool_calls_section_end|>

A client that puts ids of its own into the conversation teaches the model to write such an id, or a
bare number, instead of the name; then the arguments tell which tool is meant.
"""

from __future__ import annotations

import re

from sapwood.text.json_source import json_value, parsed
from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call_of
from sapwood.text.tools.nameless import tool_of

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"

_ID = re.compile(r"(?P<space>functions\.)?(?P<name>.+?)(?P<number>:[0-9]+)?")
_MARK = re.compile(r"[^\s<|]+")


class KimiK2(ToolFormat):
    name = "kimi_k2"
    openings = (SECTION_BEGIN, CALL_BEGIN)
    strays = (SECTION_END, CALL_END, ARGUMENTS)
    tags = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_END, ARGUMENTS)

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening == SECTION_BEGIN:
            yield from source.space()
            yield from source.expect(CALL_BEGIN)
        while True:
            yield from self._call(source)
            if (yield from source.skips_after_space(SECTION_END)):
                return
            if not (yield from source.skips_after_space(CALL_BEGIN)):
                return

    def _call(self, source: CallSource) -> Steps[None]:
        yield from source.space()
        call_id = yield from source.while_matching(_MARK, limit=256)
        yield from source.space()
        yield from source.expect(ARGUMENTS)
        match = _ID.fullmatch(call_id)
        if match is None:
            raise Malformed
        name, is_name = match["name"], bool(match["space"] or match["number"])
        if is_name or name in source.tool_schemas:
            yield from json_call_of(source, name, call_id)
        else:
            yield from _nameless(source, call_id)
        yield from source.close(CALL_END)

    def structure(self, name: str) -> CallStructure | None:
        return CallStructure(
            trigger=SECTION_BEGIN,
            begin=f"{SECTION_BEGIN}{CALL_BEGIN}functions.{name}:0{ARGUMENTS}",
            end=f"{CALL_END}{SECTION_END}",
        )


def _nameless(source: CallSource, call_id: str) -> Steps[None]:
    """Read a call whose arguments must tell which tool is meant."""
    tools = source.tool_schemas
    if len(tools) == 1:
        yield from json_call_of(source, next(iter(tools)), call_id)
        return
    yield from source.space()
    parts: list[str] = []
    yield from json_value(source, parts.append)
    text = "".join(parts)
    try:
        arguments = parsed(text)
    except ValueError as error:
        raise Malformed from error
    if not isinstance(arguments, dict):
        raise Malformed
    # An unknown name is refused as such: the calls after it are read.
    source.start(tool_of(arguments, tools) or call_id, call_id)
    source.arguments(text)
    source.end_call()
