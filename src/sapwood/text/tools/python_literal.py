"""Reads Python literals while they arrive, and hands them on as JSON."""

from __future__ import annotations

import json
import re
from math import isinf

from sapwood.text.json_source import MAX_DEPTH, read_whole
from sapwood.text.source import Emit, Malformed, Source, Steps

_PLAIN = re.compile(r"[^'\"\\]+")
_WORD = re.compile(r"[-+.0-9A-Za-z_]+")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"[-+]?[0-9](_?[0-9]){0,4000}")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {
    "None": "null",
    "True": "true",
    "False": "false",
    "null": "null",
    "true": "true",
    "false": "false",
}
_ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "a": "\a",
    "v": "\v",
    "0": "\0",
    "\\": "\\",
    "'": "'",
    '"': '"',
    "\n": "",
}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_HEX = frozenset("0123456789abcdefABCDEF")


def python_value(source: Source, out: Emit, depth: int = 0) -> Steps[None]:
    """Read one literal and hand it on as JSON; a tuple becomes an array.

    Raises Malformed if the text is no literal.
    """
    if depth > MAX_DEPTH:
        raise Malformed
    first = yield from source.space()
    if first in ("'", '"'):
        yield from _string(source, out, first)
    elif first == "{":
        yield from _dictionary(source, out, depth)
    elif first in ("[", "("):
        yield from _sequence(source, out, depth, closing="]" if first == "[" else ")")
    else:
        out(_scalar((yield from source.while_matching(_WORD))))


def literal_json(text: str) -> str | None:
    """The Python literal as JSON; None if the text is not a literal that JSON can express."""
    return read_whole(text, python_value)


def _scalar(text: str) -> str:
    if text in _WORDS:
        return _WORDS[text]
    if _NUMBER.fullmatch(text) and not isinf(float(text)):
        return text
    if _INTEGER.fullmatch(text):
        return str(int(text))
    if _FLOAT.fullmatch(text):
        value = float(text)
        if not isinf(value):
            return json.dumps(value)
    raise Malformed


def _sequence(source: Source, out: Emit, depth: int, *, closing: str) -> Steps[None]:
    source.pos += 1
    out("[")
    count = 0
    while (yield from source.space()) != closing:
        if count:
            out(", ")
        yield from python_value(source, out, depth + 1)
        count += 1
        if not (yield from source.skips_after_space(",")):
            break
    yield from source.space()
    yield from source.expect(closing)
    out("]")


def _dictionary(source: Source, out: Emit, depth: int) -> Steps[None]:
    source.pos += 1
    out("{")
    count = 0
    while (quote := (yield from source.space())) != "}":
        if quote not in ("'", '"'):
            raise Malformed
        if count:
            out(", ")
        yield from _string(source, out, quote)
        yield from source.space()
        yield from source.expect(":")
        out(": ")
        yield from python_value(source, out, depth + 1)
        count += 1
        if not (yield from source.skips_after_space(",")):
            break
    yield from source.space()
    yield from source.expect("}")
    out("}")


def _string(source: Source, out: Emit, quote: str) -> Steps[None]:
    is_triple = (yield from source.peek(3)) == quote * 3
    closing = quote * 3 if is_triple else quote
    source.pos += len(closing)
    out('"')
    while True:
        first = yield from source.peek()
        if not first:
            raise Malformed
        if first == quote and (yield from source.skips(closing)):
            break
        if first == "\\":
            out(_in_json((yield from _escaped(source))))
            continue
        start = source.pos
        match = source.match_here(_PLAIN)
        source.pos = start + 1 if match is None else match.end()
        out(_in_json(source.slice(start, source.pos)))
    out('"')


def _escaped(source: Source) -> Steps[str]:
    escape = yield from source.peek(2)
    if len(escape) < 2:
        raise Malformed
    letter = escape[1]
    digits = _HEX_DIGITS.get(letter)
    if digits is None:
        source.pos += 2
        # As in Python, a backslash before any other character stands for itself.
        return _ESCAPES.get(letter, escape)
    code = (yield from source.peek(2 + digits))[2:]
    value = int(code, 16) if len(code) == digits and _HEX.issuperset(code) else -1
    # Halves of surrogate pairs are no characters, and UTF-8 cannot hold them.
    if not 0 <= value <= 0x10FFFF or 0xD800 <= value < 0xE000:
        raise Malformed
    source.pos += 2 + digits
    return chr(value)


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
