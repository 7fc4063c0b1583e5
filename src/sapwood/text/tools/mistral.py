"""Mistral: a JSON array of calls, or, of newer models, name and arguments after a tag each.

[TOOL_CALLS] [{"name": "f", "arguments": {…}}, …]
[TOOL_CALLS]f[ARGS]{…}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{…}
"""

from __future__ import annotations

import re

from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat, short_call_id
from sapwood.text.tools.json_call import json_call, json_call_list, json_call_of

BEGIN, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

_ID = re.compile(r"[A-Za-z0-9]+")


class Mistral(ToolFormat):
    name = "mistral"
    openings = (BEGIN,)
    tags = (BEGIN, CALL_ID, ARGUMENTS, "]", ",")

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        first = yield from source.space()
        if first == "[":
            source.pos += 1
            yield from json_call_list(source)
        elif first == "{":
            yield from json_call(source)
        else:
            yield from self._named(source)

    def _named(self, source: CallSource) -> Steps[None]:
        name = yield from source.tool_name()
        call_id = None
        if (yield from source.skips_after_space(CALL_ID)):
            call_id = yield from source.while_matching(_ID, limit=64)
        # Devstral does not write the tag before the arguments.
        tag = yield from source.skips_after_space(ARGUMENTS)
        if tag is None and (yield from source.peek()) != "{":
            raise Malformed
        yield from json_call_of(source, name, call_id)

    def structure(self, name: str) -> CallStructure | None:
        begin = f'{BEGIN} [{{"name": "{name}", "arguments": '
        return CallStructure(trigger=BEGIN, begin=begin, end="}]")

    def new_call_id(self) -> str:
        return short_call_id()
