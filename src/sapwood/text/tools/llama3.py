"""Llama 3.1 to 3.3: JSON objects after a tag, or as the whole answer.

<|python_tag|>{"name": "f", "parameters": {…}}; {"name": "g", "parameters": {…}}
"""

from __future__ import annotations

from sapwood.text.source import Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call

BEGIN = "<|python_tag|>"


class Llama3(ToolFormat):
    name = "llama3"
    openings = (BEGIN,)
    opens_answer = ("{",)
    tags = (BEGIN, ";")

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening in self.opens_answer:
            source.pos -= 1
        while True:
            yield from json_call(source)
            if not (yield from source.skips_after_space(";")):
                return
            source.commit()
            if (yield from source.space()) != "{":
                return

    def structure(self, name: str) -> CallStructure | None:
        begin = f'{BEGIN}{{"name": "{name}", "parameters": '
        return CallStructure(trigger=BEGIN, begin=begin, end="}")
