"""MiniMax M2: elements inside one of its own.

<minimax:tool_call>
<invoke name="f">
<parameter name="p">v</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from sapwood.text.tools.invocations import Invocations

BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"


class MiniMaxM2(Invocations):
    name = "minimax-m2"
    invoke, invoke_end = '<invoke name="', "</invoke>"
    parameter, parameter_end = '<parameter name="', "</parameter>"
    call_end = END
    openings = (BEGIN,)
    reopens = (invoke,)
    tags = (BEGIN, END, invoke, invoke_end, parameter, parameter_end)
