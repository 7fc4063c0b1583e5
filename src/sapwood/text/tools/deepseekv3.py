# ruff: noqa: RUF001, RUF002 - the wide bars are the formats' own
"""DeepSeek V3 and R1: the arguments stand in a fenced block of JSON.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
```json
{…}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from __future__ import annotations

import re

from sapwood.text.source import Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call_of

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"

_WORD = re.compile(r"\w+")


class DeepSeekV3(ToolFormat):
    name = "deepseekv3"
    openings = (CALLS_BEGIN, CALL_BEGIN)
    strays = (CALLS_END, CALL_END)
    tags = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening == CALLS_BEGIN:
            yield from source.space()
            yield from source.expect(CALL_BEGIN)
        while True:
            yield from self.call(source)
            if (yield from source.skips_after_space(CALLS_END)):
                return
            if not (yield from source.skips_after_space(CALL_BEGIN)):
                return

    def call(self, source: CallSource) -> Steps[None]:
        yield from kind_of_call(source)
        yield from source.expect(SEPARATOR)
        name = yield from source.tool_name()
        yield from source.space()
        yield from source.expect("```json")
        yield from json_call_of(source, name)
        yield from source.close("```", CALL_END)

    def structure(self, name: str) -> CallStructure | None:
        return CallStructure(
            trigger=CALLS_BEGIN,
            begin=f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n",
            end=f"\n```{CALL_END}{CALLS_END}",
        )


def kind_of_call(source: CallSource) -> Steps[None]:
    """Read the word "function", which some answers misspell or leave out."""
    yield from source.space()
    yield from source.while_matching(_WORD, limit=64)
    yield from source.space()
