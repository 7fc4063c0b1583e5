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

import re
from typing import ClassVar

from sapwood.text.source import Emit, Malformed, Steps
from sapwood.text.tools.elements import KEY, ArgumentsObject, ReadValue, next_tag, skip_doubled
from sapwood.text.tools.format import CallSource, ToolFormat

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

_MAX_KEY = 256
_MAX_DRIFT = 64
_BROKEN_END = "</parameter"
_DRIFT = re.compile(r"[\w/]*>?\s*")
"""What may stand after `</parameter` in a tag that ends a value and is misspelt."""
_STOPS = tuple(
    line_break + tag
    for tag in (_BROKEN_END, PARAMETER, FUNCTION_END, END)
    for line_break in ("\n", "")
)


class Qwen3Coder(ToolFormat):
    """The model sometimes leaves out the outer tag, so `<function=` may begin a call too.

    It also forgets the tag after a value, or misspells it. So a value may end before the next
    argument, the end of the function and the end of the call.

    trims_alone  whether a line break at the end of a value that begins on the line of its tag is
                 left out too
    """

    name = "qwen3_coder"
    openings = (BEGIN, FUNCTION)
    tags = (BEGIN, END, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END)
    trims_alone: ClassVar[bool] = True

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
            before = source.pos
            # A function without its end ends before the next one, and before the end of the call.
            tag = yield from next_tag(source, PARAMETER, FUNCTION_END, END, FUNCTION, BEGIN)
            if tag is None:
                raise Malformed
            if tag in (END, FUNCTION, BEGIN):
                source.pos = before
            if tag != PARAMETER:
                arguments.end()
                return
            key = yield from source.while_matching(KEY, limit=_MAX_KEY)
            yield from source.expect(">")
            arguments.key(key)
            yield from arguments.typed(key, self._value(source, arguments))

    def _value(self, source: CallSource, arguments: ArgumentsObject) -> ReadValue:
        def read(out: Emit) -> Steps[None]:
            trims = (yield from source.skips("\n")) or self.trims_alone
            while True:
                stop = yield from source.streaming_until(_STOPS, out)
                tag = stop.removeprefix("\n")
                if tag == _BROKEN_END:
                    ends = yield from _ends_at_broken_tag(source, arguments)
                else:
                    ends = yield from _ends_before(source, tag, arguments)
                if not ends:
                    out(stop)
                    continue
                if stop != tag and not trims:
                    out("\n")
                return

        return read


def _ends_at_broken_tag(source: CallSource, arguments: ArgumentsObject) -> Steps[bool]:
    """Whether a value ends with the tag whose beginning `</parameter` has been read; reads it then.

    A misspelt tag ends a value only directly before one of the tags that may follow a value.
    """
    if (yield from source.skips(">")):
        yield from skip_doubled(source, PARAMETER_END)
        return True
    start = source.pos
    drift = _DRIFT.match((yield from source.peek(_MAX_DRIFT)))
    assert drift is not None
    source.pos += drift.end()
    for tag in (PARAMETER, FUNCTION_END, END):
        if (yield from source.skips(tag)):
            if (yield from _ends_before(source, tag, arguments)):
                return True
            break
    source.pos = start
    return False


def _ends_before(source: CallSource, tag: str, arguments: ArgumentsObject) -> Steps[bool]:
    """Whether a value without an end ends before the tag, which has been read; unreads it then.

    Values may be code with such tags in it. So an argument's tag counts only if the tool has an
    argument of that name which is not yet given, and the end of a function or of a call only if
    nothing but the next call or the end of the text follows.
    """
    after = source.pos
    if tag == PARAMETER:
        ends = yield from _names_argument(source, arguments)
    else:
        next_tags = (BEGIN, FUNCTION, END) if tag == FUNCTION_END else (BEGIN,)
        next_tag = yield from source.skips_after_space(*next_tags)
        ends = next_tag is not None or (yield from source.space()) == ""
    source.pos = after - len(tag) if ends else after
    return ends


def _names_argument(source: CallSource, arguments: ArgumentsObject) -> Steps[bool]:
    try:
        key = yield from source.while_matching(KEY, limit=_MAX_KEY)
    except Malformed:
        return False
    return (yield from source.peek()) == ">" and arguments.may_take(key)
