"""The common part of formats with `invoke` and `parameter` elements."""

from __future__ import annotations

from typing import ClassVar

from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.elements import ArgumentsObject, attributes
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
        """Read one call, whose `invoke` tag has been read up to the name."""
        source.start((yield from attributes(source)))
        arguments = ArgumentsObject(source)
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
        yield from arguments.typed(key, self.parameter_end)
