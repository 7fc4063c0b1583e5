"""Models that nobody taught to call: the prompt tells them this format, see `tool_prompt.py`.

<tool_call>[{"name": "f", "arguments": {…}}, …]</tool_call>

They do not always follow it to the letter. So single objects are calls too; a fence of Markdown may
stand around the JSON; and where the answer begins with the JSON, the tags may be missing.
"""

from __future__ import annotations

import re

from sapwood.text.source import Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call, json_call_list

BEGIN, END, FENCE = "<tool_call>", "</tool_call>", "```"

_LANGUAGE = re.compile(r"[A-Za-z]+")


class Generic(ToolFormat):
    name = "generic"
    openings = (BEGIN,)
    opens_answer = ("{", "[", FENCE)
    tags = (BEGIN, END)
    is_told_in_text = True

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening in ("{", "["):
            source.pos -= 1
        is_fenced = opening == FENCE or (yield from source.skips_after_space(FENCE)) is not None
        if is_fenced:
            yield from source.while_matching(_LANGUAGE, limit=16)
        if (yield from source.space()) == "[":
            source.pos += 1
            yield from json_call_list(source)
        else:
            yield from json_call(source)
            while (yield from source.space()) == "{":
                yield from json_call(source)
        if is_fenced:
            yield from source.close(FENCE)
        if opening == BEGIN:
            yield from source.close(END)

    def structure(self, name: str) -> CallStructure | None:
        begin = f'{BEGIN}[{{"name": "{name}", "arguments": '
        return CallStructure(trigger=BEGIN, begin=begin, end=f"}}]{END}")
