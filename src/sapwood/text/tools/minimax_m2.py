"""MiniMax M2: elements inside one of its own.

<minimax:tool_call>
<invoke name="f">
<parameter name="p">v</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from sapwood.text.source import Steps
from sapwood.text.tools.format import CallSource
from sapwood.text.tools.invocations import Invocations

BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"


class MiniMaxM2(Invocations):
    name = "minimax-m2"
    openings = (BEGIN,)
    invoke, invoke_end = '<invoke name="', "</invoke>"
    parameter, parameter_end = '<parameter name="', "</parameter>"
    tags = (BEGIN, END, invoke, invoke_end, parameter, parameter_end)

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        while (yield from source.skips_after_space(self.invoke)):
            yield from self.invocation(source)
        yield from source.close(END)
