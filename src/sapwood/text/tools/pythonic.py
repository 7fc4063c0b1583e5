"""Llama 4 and others: a Python list of calls.

[f(a=1, b="x"), g()]
"""

from __future__ import annotations

import json
import re

from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource, ToolFormat
from sapwood.text.tools.python_literal import python_value

BEGIN, END = "<|python_start|>", "<|python_end|>"

_IDENTIFIER = re.compile(r"\w+")


class Pythonic(ToolFormat):
    """Most brackets in a text are no calls: a name and a parenthesis must follow at once."""

    name = "pythonic"
    openings = (BEGIN, "[")
    strays = (END,)
    tags = (BEGIN, END, "[", "]", ",")

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening == BEGIN:
            yield from source.space()
            yield from source.expect("[")
        while True:
            yield from source.space()
            yield from self._call(source)
            if (yield from source.skips_after_space("]")):
                break
            if not (yield from source.skips_after_space(",")):
                raise Malformed
        yield from source.close(END)

    def _call(self, source: CallSource) -> Steps[None]:
        name = yield from source.tool_name()
        yield from source.expect("(")
        source.start(name)
        keys: set[str] = set()
        while (yield from source.space()) != ")":
            key = yield from source.while_matching(_IDENTIFIER, limit=256)
            yield from source.space()
            yield from source.expect("=")
            if not key or key in keys:
                raise Malformed
            source.arguments(", " if keys else "{")
            source.arguments(json.dumps(key, ensure_ascii=False) + ": ")
            keys.add(key)
            yield from python_value(source, source.arguments)
            if not (yield from source.skips_after_space(",")):
                break
        yield from source.space()
        yield from source.expect(")")
        source.arguments("}" if keys else "{}")
        source.end_call()
