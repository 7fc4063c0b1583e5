# ruff: noqa: RUF001, RUF002 - the wide bars are the formats' own
"""DeepSeek V3.2: elements of DSML; an attribute of each argument says whether it is text or JSON.

<｜DSML｜function_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="p" string="true">v</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>

The model sometimes leaves out the outer element, and sometimes writes all arguments as one JSON
object.
"""

from __future__ import annotations

from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.elements import KEY, ArgumentsObject
from sapwood.text.tools.format import CallSource
from sapwood.text.tools.invocations import Invocations
from sapwood.text.tools.json_call import json_arguments

BEGIN, END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"


class DeepSeekV32(Invocations):
    name = "deepseekv32"
    invoke, invoke_end = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
    call_end = END
    openings = (BEGIN, invoke)
    parameter, parameter_end = '<｜DSML｜parameter name="', "</｜DSML｜parameter>"
    strays = (END, invoke_end)
    tags = (BEGIN, END, invoke, invoke_end, parameter, parameter_end)

    def body(self, source: CallSource, arguments: ArgumentsObject) -> Steps[None]:
        if (yield from source.space()) != "{":
            yield from super().body(source, arguments)
            return
        yield from json_arguments(source, source.arguments)
        yield from source.space()
        yield from source.expect(self.invoke_end)
        source.end_call()

    def argument(self, source: CallSource, arguments: ArgumentsObject) -> Steps[None]:
        key = yield from source.while_matching(KEY, limit=256)
        yield from source.expect('" string="')
        is_text = yield from source.until('">', limit=8)
        if is_text not in ("true", "false"):
            raise Malformed
        arguments.key(key)
        if is_text == "true":
            yield from arguments.text(self.value(source))
        else:
            yield from arguments.json(self.value(source))
