"""Calls whose arguments are elements, one per argument, each value bare text."""

from __future__ import annotations

import json
import re

from sapwood.text.json_source import json_value
from sapwood.text.source import Emit, Malformed, Steps
from sapwood.text.tools.argument_types import STRING, property_schema, types_of, value_text
from sapwood.text.tools.format import CallSource

KEY = re.compile(r"[^\"<>\n]+")
"""Characters of an argument's name in a tag."""


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

    def text(self, closing: str, *, trims_newlines: bool = False) -> Steps[None]:
        """Write a string argument, which ends before the tag `closing`, while it arrives."""
        source = self._source
        source.arguments('"')
        yield from _text(source, closing, _escaping(source), trims_newlines=trims_newlines)
        source.arguments('"')

    def typed(self, key: str, closing: str, *, trims_newlines: bool = False) -> Steps[None]:
        """Write an argument, which ends before the tag `closing`, as the tool's schema types it."""
        source = self._source
        root = source.parameters
        schema = property_schema(root, key)
        if types_of(schema, root) == STRING:
            yield from self.text(closing, trims_newlines=trims_newlines)
            return
        parts: list[str] = []
        yield from _text(source, closing, parts.append, trims_newlines=trims_newlines)
        source.arguments(value_text("".join(parts), schema, root))

    def json(self, closing: str) -> Steps[None]:
        """Write an argument whose value is JSON already."""
        source = self._source
        yield from source.space()
        yield from json_value(source, source.arguments)
        yield from source.space()
        yield from source.expect(closing)

    def end(self) -> None:
        self._source.arguments("}" if self._keys else "{}")
        self._source.end_call()


def attributes(source: CallSource) -> Steps[str]:
    """Read the rest of a tag after `name="`, up to `">`. Returns the name."""
    name = yield from source.while_matching(KEY, limit=256)
    yield from source.expect('">')
    return name


def _text(source: CallSource, closing: str, out: Emit, *, trims_newlines: bool) -> Steps[None]:
    closings = [closing]
    if trims_newlines and (yield from source.skips("\n")):
        # The value stands on lines of its own; the line breaks around it do not belong to it.
        closings.append("\n" + closing)
    yield from source.streaming_until(closings, out)


def _escaping(source: CallSource) -> Emit:
    return lambda text: source.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
