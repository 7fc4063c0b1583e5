"""GLM 4.5 and 4.6: keys and values in turn, a line each.

<tool_call>NAME
<arg_key>k</arg_key>
<arg_value>v</arg_value>
</tool_call>
"""

from __future__ import annotations

from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.elements import KEY, ArgumentsObject, next_tag, up_to
from sapwood.text.tools.format import CallSource, ToolFormat

BEGIN, END = "<tool_call>", "</tool_call>"
KEY_BEGIN, KEY_END = "<arg_key>", "</arg_key>"
VALUE_BEGIN, VALUE_END = "<arg_value>", "</arg_value>"


class Glm45(ToolFormat):
    name = "glm45"
    openings = (BEGIN,)
    tags = (BEGIN, END, KEY_BEGIN, KEY_END, VALUE_BEGIN, VALUE_END)

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        yield from source.space()
        name = yield from source.tool_name()
        # The space after the name tells a call from a sentence that only mentions the tag.
        yield from _gap(source)
        tag = yield from source.skips_after_space(KEY_BEGIN, END)
        if tag is None:
            raise Malformed
        source.start(name)
        arguments = ArgumentsObject(source)
        while tag == KEY_BEGIN:
            yield from source.space()
            key = (yield from source.while_matching(KEY, limit=256)).strip()
            yield from source.space()
            yield from source.expect(KEY_END)
            yield from _gap(source)
            yield from source.expect(VALUE_BEGIN)
            arguments.key(key)
            yield from arguments.typed(key, up_to(source, VALUE_END, END, (BEGIN,)))
            before = source.pos
            tag = yield from next_tag(source, KEY_BEGIN, END, BEGIN)
            if tag == BEGIN:
                # The next call; this one has no end.
                source.pos = before
        if tag is None:
            raise Malformed
        arguments.end()


def _gap(source: CallSource) -> Steps[None]:
    """Read white space; the model sometimes spells a line break as a backslash and an n."""
    while (yield from source.space()) == "\\" and (yield from source.skips("\\n")):
        pass
