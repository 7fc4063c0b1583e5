"""Calls whose arguments are elements, one per argument, each value bare text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from sapwood.text.json_source import mended_json
from sapwood.text.source import Emit, Malformed, Steps
from sapwood.text.tools.argument_types import (
    STRING,
    has_property,
    property_schema,
    types_of,
    value_text,
)
from sapwood.text.tools.format import CallSource

KEY = re.compile(r"[^\"<>\n]+")
"""Characters of an argument's name in a tag."""


_BETWEEN = re.compile(r"[^<]+")
_MAX_BETWEEN = 256

ReadValue = Callable[[Emit], Steps[None]]
"""Reads the text of a value, hands it on as it comes, and reads the tag that ends it."""


class ArgumentsObject:
    """The JSON object of a call's arguments, written one argument at a time."""

    def __init__(self, source: CallSource) -> None:
        self._source = source
        self._keys: set[str] = set()

    def key(self, key: str) -> None:
        if not key or key in self._keys:
            raise Malformed
        self._source.arguments(", " if self._keys else "{")
        self._keys.add(key)
        self._source.arguments(json.dumps(key, ensure_ascii=False) + ": ")

    def may_take(self, key: str) -> bool:
        """Whether the next argument can have this name: the tool has it, and it is new."""
        return bool(key) and key not in self._keys and has_property(self._source.parameters, key)

    def text(self, read: ReadValue) -> Steps[None]:
        """Write a string argument while it arrives."""
        source = self._source
        source.arguments('"')
        yield from read(_escaping(source))
        source.arguments('"')

    def typed(self, key: str, read: ReadValue) -> Steps[None]:
        """Write an argument as the tool's schema types it."""
        source = self._source
        root = source.parameters
        schema = property_schema(root, key)
        if types_of(schema, root) == STRING:
            yield from self.text(read)
            return
        parts: list[str] = []
        yield from read(parts.append)
        source.arguments(value_text("".join(parts), schema, root))

    def json(self, read: ReadValue) -> Steps[None]:
        """Write an argument whose value is JSON already; what is no JSON becomes a string."""
        parts: list[str] = []
        yield from read(parts.append)
        text = "".join(parts)
        value = mended_json(text)
        self._source.arguments(json.dumps(text, ensure_ascii=False) if value is None else value)

    def end(self) -> None:
        self._source.arguments("}" if self._keys else "{}")
        self._source.end_call()


def next_tag(source: CallSource, *tags: str) -> Steps[str | None]:
    """Read one of the tags, and what stands before it. If another tag follows, read nothing.

    Text between elements, such as a comma, is passed over. Text with a tag at its end is not: that
    is an argument whose beginning is broken, and the call would be made without it.
    """
    start = source.pos
    tag = yield from source.skips_after_space(*tags)
    if tag is not None:
        return tag
    yield from source.while_matching(_BETWEEN, limit=_MAX_BETWEEN)
    tag = yield from source.skips_after_space(*tags)
    if tag is None:
        source.pos = start
    return tag


def attributes(source: CallSource) -> Steps[str]:
    """Read the rest of a tag after `name="`, up to `">`. Returns the name."""
    name = yield from source.while_matching(KEY, limit=256)
    yield from source.expect('">')
    return name


def up_to(source: CallSource, end: str, outer_end: str, followers: tuple[str, ...]) -> ReadValue:
    """Reads a value that ends before the first tag `end`.

    outer_end  a tag before which a value without `end` ends, if one of `followers` or the end of
               the text comes next; else it is text of the value
    """

    def read(out: Emit) -> Steps[None]:
        stops = (end, "\n" + outer_end, outer_end)
        while (stop := (yield from source.streaming_until(stops, out))) != end:
            after = source.pos
            if (yield from follows(source, *followers)):
                source.pos = after - len(outer_end)
                return
            out(stop)
        yield from skip_doubled(source, end)

    return read


def skip_doubled(source: CallSource, end: str) -> Steps[None]:
    """Read the tag that has just been read as often as it follows once more."""
    while (yield from source.skips_after_space(end)):
        pass


def follows(source: CallSource, *tags: str) -> Steps[bool]:
    """Whether one of the tags or the end of the text comes next. Reads nothing."""
    start = source.pos
    tag = yield from source.skips_after_space(*tags)
    at_end = (yield from source.space()) == ""
    source.pos = start
    return tag is not None or at_end


def _escaping(source: CallSource) -> Emit:
    return lambda text: source.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
