# ruff: noqa: RUF001, RUF002 - the wide bars are the formats' own
"""Step 3: elements of StepTML inside tags of their own.

<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="f">
<steptml:parameter name="p">v</steptml:parameter></steptml:invoke><｜tool_call_end｜>
<｜tool_calls_end｜>
"""

from __future__ import annotations

from sapwood.text.source import Steps
from sapwood.text.tools.deepseekv3 import kind_of_call
from sapwood.text.tools.format import CallSource
from sapwood.text.tools.invocations import Invocations

CALLS_BEGIN, CALLS_END = "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"
CALL_BEGIN, CALL_END = "<｜tool_call_begin｜>", "<｜tool_call_end｜>"
SEPARATOR = "<｜tool_sep｜>"


class Step3(Invocations):
    name = "step3"
    openings = (CALLS_BEGIN, CALL_BEGIN)
    strays = (CALLS_END, CALL_END)
    call_end = CALL_END
    invoke, invoke_end = '<steptml:invoke name="', "</steptml:invoke>"
    parameter, parameter_end = '<steptml:parameter name="', "</steptml:parameter>"
    tags = (
        *(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR),
        *(invoke, invoke_end, parameter, parameter_end),
    )

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening == CALLS_BEGIN:
            yield from source.space()
            yield from source.expect(CALL_BEGIN)
        while True:
            yield from kind_of_call(source)
            yield from source.expect(SEPARATOR)
            yield from source.space()
            yield from source.expect(self.invoke)
            yield from self.invocation(source)
            yield from source.close(CALL_END)
            if (yield from source.skips_after_space(CALLS_END)):
                return
            if not (yield from source.skips_after_space(CALL_BEGIN)):
                return
