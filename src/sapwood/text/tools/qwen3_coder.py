"""Qwen3-Coder: elements named by function and parameter, values on lines of their own.

<tool_call>
<function=NAME>
<parameter=p>
v
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.elements import KEY, ArgumentsObject
from sapwood.text.tools.format import CallSource, ToolFormat

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3Coder(ToolFormat):
    """The model sometimes leaves out the outer tag, so `<function=` may begin a call too."""

    name = "qwen3_coder"
    openings = (BEGIN, FUNCTION)
    tags = (BEGIN, END, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END)

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening == BEGIN:
            yield from source.space()
            yield from source.expect(FUNCTION)
        while True:
            yield from self._function(source)
            if not (yield from source.skips_after_space(FUNCTION)):
                break
        yield from source.close(END)

    def _function(self, source: CallSource) -> Steps[None]:
        name = yield from source.tool_name()
        yield from source.expect(">")
        source.start(name)
        arguments = ArgumentsObject(source)
        while True:
            tag = yield from source.skips_after_space(PARAMETER, FUNCTION_END)
            if tag is None:
                raise Malformed
            if tag == FUNCTION_END:
                arguments.end()
                return
            key = yield from source.while_matching(KEY, limit=256)
            yield from source.expect(">")
            arguments.key(key)
            yield from arguments.typed(key, PARAMETER_END, trims_newlines=True)
