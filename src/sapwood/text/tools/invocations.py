"""The common part of formats with `invoke` and `parameter` elements."""

from __future__ import annotations

from typing import ClassVar

from sapwood.text.source import Emit, Malformed, Steps
from sapwood.text.tools.elements import KEY, ArgumentsObject, ReadValue, attributes
from sapwood.text.tools.format import CallSource, ToolFormat


class Invocations(ToolFormat):
    """Calls such as `<invoke name="f"><parameter name="p">v</parameter></invoke>`.

    invoke, parameter  the beginnings of the opening tags, up to the name
    """

    invoke: ClassVar[str]
    invoke_end: ClassVar[str]
    parameter: ClassVar[str]
    parameter_end: ClassVar[str]

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
            tag = yield from source.skips_after_space(self.parameter, self.invoke_end)
            if tag is None:
                raise Malformed
            if tag == self.invoke_end:
                arguments.end()
                return
            yield from self.argument(source, arguments)

    def argument(self, source: CallSource, arguments: ArgumentsObject) -> Steps[None]:
        key = yield from attributes(source)
        arguments.key(key)
        yield from arguments.typed(key, self.value(source))

    def value(self, source: CallSource) -> ReadValue:
        """Reads a value up to the tag that ends it.

        The tag is text of the value if neither an argument nor the end of the call follows, but
        the same tag once more.
        """

        def read(out: Emit) -> Steps[None]:
            yield from source.streaming_until([self.parameter_end], out)
            while not (yield from self._follows(source)):
                more: list[str] = []
                tags = (self.parameter_end, self.parameter, self.invoke_end)
                tag = yield from source.streaming_until(tags, more.append)
                if tag != self.parameter_end:
                    raise Malformed
                out("".join((self.parameter_end, *more)))

        return read

    def _follows(self, source: CallSource) -> Steps[bool]:
        """Whether an argument or the end of the call comes next. Reads nothing."""
        start = source.pos
        tag = yield from source.skips_after_space(self.parameter, self.invoke_end)
        at_end = (yield from source.space()) == ""
        source.pos = start
        return tag is not None or at_end
