"""Kimi K2: the model numbers its calls itself, and wants to see its numbers again.

<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}
<|tool_call_end|><|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call_of

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"

_ID = re.compile(r"(?:functions\.)?(?P<name>.+?)(?::[0-9]+)?")


class KimiK2(ToolFormat):
    name = "kimi_k2"
    openings = (SECTION_BEGIN, CALL_BEGIN)
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
        call_id = yield from source.tool_name()
        yield from source.space()
        yield from source.expect(ARGUMENTS)
        match = _ID.fullmatch(call_id)
        if match is None:
            raise Malformed
        yield from json_call_of(source, match["name"], call_id)
        yield from source.close(CALL_END)

    def structure(self, name: str) -> CallStructure | None:
        return CallStructure(
            trigger=SECTION_BEGIN,
            begin=f"{SECTION_BEGIN}{CALL_BEGIN}functions.{name}:0{ARGUMENTS}",
            end=f"{CALL_END}{SECTION_END}",
        )
