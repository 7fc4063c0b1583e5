"""Qwen 2.5, Qwen 3 and Hermes: a JSON object between tags.

<tool_call>
{"name": "f", "arguments": {…}}
</tool_call>
"""

from __future__ import annotations

from typing import ClassVar

from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call, json_call_list

BEGIN, END = "<tool_call>", "</tool_call>"


class Qwen25(ToolFormat):
    name = "qwen25"
    openings = (BEGIN,)
    tags: ClassVar[tuple[str, ...]] = (BEGIN, END)

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if (yield from source.skips_after_space("[")):
            yield from json_call_list(source)
            yield from source.close(END)
            return
        while True:
            yield from json_call(source)
            # Several objects between one pair of tags are several calls; the comma is optional.
            comma = yield from source.skips_after_space(",")
            if (yield from source.space()) == "{":
                continue
            if comma:
                raise Malformed
            break
        yield from source.close(END)

    def structure(self, name: str) -> CallStructure | None:
        begin = f'{BEGIN}\n{{"name": "{name}", "arguments": '
        return CallStructure(trigger=BEGIN, begin=begin, end=f"}}\n{END}")
