# ruff: noqa: RUF002 - the wide bars are the formats' own
"""DeepSeek V3.1: name and arguments on both sides of a separator.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from __future__ import annotations

from sapwood.text.source import Steps
from sapwood.text.tools.deepseekv3 import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    DeepSeekV3,
)
from sapwood.text.tools.format import CallSource, CallStructure
from sapwood.text.tools.json_call import json_call_of


class DeepSeekV31(DeepSeekV3):
    name = "deepseekv31"

    def call(self, source: CallSource) -> Steps[None]:
        name = yield from source.tool_name()
        yield from source.expect(SEPARATOR)
        yield from json_call_of(source, name)
        yield from source.close(CALL_END)

    def structure(self, name: str) -> CallStructure | None:
        return CallStructure(
            trigger=CALLS_BEGIN,
            begin=f"{CALLS_BEGIN}{CALL_BEGIN}{name}{SEPARATOR}",
            end=f"{CALL_END}{CALLS_END}",
        )
