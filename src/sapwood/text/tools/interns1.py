"""Intern-S1: a JSON object between the tags of an action of its plugins.

<|action_start|> <|plugin|>
{"name": "f", "parameters": {…}}<|action_end|>
"""

from __future__ import annotations

from sapwood.text.source import Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call

BEGIN, PLUGIN, END = "<|action_start|>", "<|plugin|>", "<|action_end|>"


class InternS1(ToolFormat):
    name = "interns1"
    openings = (BEGIN,)
    strays = (END,)
    tags = (BEGIN, PLUGIN, END)

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        yield from source.space()
        yield from source.expect(PLUGIN)
        yield from json_call(source)
        yield from source.close(END)

    def structure(self, name: str) -> CallStructure | None:
        begin = f'{BEGIN} {PLUGIN}\n{{"name": "{name}", "parameters": '
        return CallStructure(trigger=BEGIN, begin=begin, end=f"}}{END}")
