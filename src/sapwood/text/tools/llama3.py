"""Llama 3.1 to 3.3: JSON objects after a tag, or as the whole answer.

<|python_tag|>{"name": "f", "parameters": {…}}; {"name": "g", "parameters": {…}}

Smaller models spell the objects as Python does now and then.
"""

from __future__ import annotations

import json

from sapwood.text.json_source import parsed
from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call
from sapwood.text.tools.python_literal import python_value

BEGIN, OBJECT = "<|python_tag|>", '{"name":'


class Llama3(ToolFormat):
    name = "llama3"
    openings = (BEGIN,)
    opens_answer = ("{",)
    reopens = (OBJECT,)
    tags = (BEGIN, ";")

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening != BEGIN:
            source.pos -= len(opening)
        while True:
            yield from self._call(source)
            if not (yield from source.skips_after_space(";")):
                return
            source.commit()
            if (yield from source.space()) != "{":
                return

    def _call(self, source: CallSource) -> Steps[None]:
        start = source.pos
        if (yield from source.skips_after_space("{")) and (yield from source.space()) == "'":
            source.pos = start
            yield from _python_call(source)
            return
        source.pos = start
        yield from json_call(source)

    def structure(self, name: str) -> CallStructure | None:
        begin = f'{BEGIN}{{"name": "{name}", "parameters": '
        return CallStructure(trigger=BEGIN, begin=begin, end="}")


def _python_call(source: CallSource) -> Steps[None]:
    """Read a call that is a Python dictionary."""
    parts: list[str] = []
    yield from python_value(source, parts.append)
    try:
        call = parsed("".join(parts))
    except ValueError as error:
        raise Malformed from error
    arguments = call.get("parameters", call.get("arguments", {}))
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        raise Malformed
    source.start(call["name"])
    source.arguments(json.dumps(arguments, ensure_ascii=False))
    source.end_call()
