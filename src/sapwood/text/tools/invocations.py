"""The common part of formats with `invoke` and `parameter` elements."""

from __future__ import annotations

from typing import ClassVar

from sapwood.text.source import Emit, Malformed, Steps
from sapwood.text.tools.elements import (
    KEY,
    ArgumentsObject,
    ReadValue,
    attributes,
    follows,
    next_tag,
    up_to,
)
from sapwood.text.tools.format import CallSource, ToolFormat


class Invocations(ToolFormat):
    """Calls such as `<invoke name="f"><parameter name="p">v</parameter></invoke>`.

    invoke, parameter  the beginnings of the opening tags, up to the name
    call_end           the tag that follows the last of the calls, or each
    """

    invoke: ClassVar[str]
    invoke_end: ClassVar[str]
    parameter: ClassVar[str]
    parameter_end: ClassVar[str]
    call_end: ClassVar[str]

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        if opening == self.invoke:
            yield from self.invocation(source)
        while (yield from source.skips_after_space(self.invoke)):
            yield from self.invocation(source)
        yield from source.close(self.call_end)

    def invocation(self, source: CallSource) -> Steps[None]:
        """Read one call, whose `invoke` tag has been read up to the name.

        A tag such as `<invoke name="f"/>` is a call without arguments.
        """
        name = yield from source.while_matching(KEY, limit=256)
        yield from source.expect('"')
        yield from source.space()
        is_empty = yield from source.skips("/")
        yield from source.expect(">")
        source.start(name)
        arguments = ArgumentsObject(source)
        if is_empty:
            arguments.end()
            return
        yield from self.body(source, arguments)

    def body(self, source: CallSource, arguments: ArgumentsObject) -> Steps[None]:
        """Read the arguments and the end of the call."""
        while True:
            before = source.pos
            # A call without its end ends before the next call, and before the end of all calls.
            ends = (self.invoke_end, self.call_end, self.invoke)
            tag = yield from next_tag(source, self.parameter, *ends)
            if tag is None:
                raise Malformed
            if tag in (self.call_end, self.invoke):
                source.pos = before
            if tag != self.parameter:
                arguments.end()
                return
            yield from self.argument(source, arguments)

    def argument(self, source: CallSource, arguments: ArgumentsObject) -> Steps[None]:
        key = yield from attributes(source)
        arguments.key(key)
        yield from arguments.typed(key, self.value(source))

    def value(self, source: CallSource) -> ReadValue:
        """Reads a value up to the tag that ends it.

        The tag is text of the value if text follows it on its line, and the same tag once more.
        """
        end = self.parameter_end
        read_first = up_to(source, end, self.invoke_end, (self.invoke, self.call_end))

        def read(out: Emit) -> Steps[None]:
            yield from read_first(out)
            tags = (self.parameter, self.invoke_end, self.call_end, self.invoke)
            while not (yield from follows(source, *tags)) and (yield from source.peek()) != "\n":
                after = source.pos
                more: list[str] = []
                tag = yield from source.streaming_until((end, *tags), more.append)
                if tag != end:
                    source.pos = after
                    return
                out("".join((end, *more)))

        return read
