"""Reads JSON while it arrives: each piece is checked and handed on at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import isinf
from typing import Any

from sapwood.base.nesting import is_deeper
from sapwood.text.source import Emit, Malformed, Source, Steps, run

MAX_DEPTH = 100
"""How deeply arrays and objects may be nested."""

_SPACE = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_NUMBER_OR_WORD = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
_HEX = frozenset("0123456789abcdefABCDEF")
_NO_LIMIT = 2**62


def json_value(source: Source, out: Emit, depth: int = 0) -> Steps[None]:
    """Read one value and hand on its text; raises Malformed at the first wrong character.

    A control character inside a string, which JSON forbids but models write, is handed on escaped.
    """
    if depth > MAX_DEPTH:
        raise Malformed
    yield from json_space(source, out)
    first = yield from source.peek()
    if first == '"':
        yield from json_string(source, out)
    elif first == "{":
        yield from _object(source, out, depth)
    elif first == "[":
        yield from _array(source, out, depth)
    else:
        scalar = yield from source.while_matching(_SCALAR)
        match = _NUMBER_OR_WORD.fullmatch(scalar)
        if match is None or (match[1] is not None and isinf(float(scalar))):
            raise Malformed
        out(scalar)


def json_space(source: Source, out: Emit) -> Steps[str]:
    """Read white space and hand it on. Returns the character after it, unread."""
    space = yield from source.while_matching(_SPACE, limit=_NO_LIMIT)
    if space:
        out(space)
    return (yield from source.peek())


def json_string(source: Source, out: Emit) -> Steps[None]:
    yield from source.expect('"')
    out('"')
    while True:
        first = yield from source.peek()
        if not first:
            raise Malformed
        if first == '"':
            source.pos += 1
            out('"')
            return
        if first == "\\":
            yield from _escape(source, out)
        elif first < " ":
            source.pos += 1
            out(json.dumps(first)[1:-1])
        else:
            out((yield from _plain(source)))


def decoded_string(source: Source) -> Steps[str]:
    """Read a string and return its value."""
    parts: list[str] = []
    yield from json_string(source, parts.append)
    return str(json.loads("".join(parts)))


def mended_json(text: str) -> str | None:
    """The text as JSON, control characters in strings escaped; None if it is not a JSON value."""
    return read_whole(text, json_value)


def read_whole(text: str, read: Callable[[Source, Emit], Steps[None]]) -> str | None:
    """What `read` hands on of a text that is there already; None unless it reads all of it."""
    source = Source()
    source.add(text)
    source.end()
    parts: list[str] = []

    def steps() -> Steps[None]:
        yield from source.space()
        yield from read(source, parts.append)
        if (yield from source.space()):
            raise Malformed

    try:
        run(source, steps())
    except Malformed:
        return None
    return "".join(parts)


class TooDeep(ValueError):
    """JSON that is nested deeper than MAX_DEPTH levels."""


def parsed(text: str) -> Any:
    """The value of a whole JSON text.

    Raises ValueError for malformed JSON, and for values that not every reader of JSON accepts: NaN,
    infinities, and halves of surrogate pairs, which UTF-8 cannot hold; TooDeep for a value that is
    nested deeper than MAX_DEPTH levels.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise _too_deep() from None
    if is_deeper(value, MAX_DEPTH):
        raise _too_deep()
    # 1e999 is read as infinity.
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _too_deep() -> TooDeep:
    return TooDeep(f"nested deeper than {MAX_DEPTH} levels")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _plain(source: Source) -> Steps[str]:
    """The characters of a string that have arrived, at least one; a later call reads the rest."""
    yield from source.peek()
    start = source.pos
    match = source.match_here(_PLAIN)
    assert match is not None
    source.pos = match.end()
    return source.slice(start, source.pos)


def _escape(source: Source, out: Emit) -> Steps[None]:
    escape = yield from source.peek(2)
    if len(escape) < 2 or escape[1] not in '"\\/bfnrtu':
        raise Malformed
    if escape[1] != "u":
        source.pos += 2
        out(escape)
        return
    code = yield from _code_unit(source, out)
    if 0xD800 <= code < 0xE000:
        # Half of a surrogate pair, which UTF-8 cannot hold alone; the other half must follow.
        second = (yield from _code_unit(source, out)) if code < 0xDC00 else 0
        if not 0xDC00 <= second < 0xE000:
            raise Malformed


def _code_unit(source: Source, out: Emit) -> Steps[int]:
    """Read and hand on `\\u` and four digits."""
    escape = yield from source.peek(6)
    if len(escape) < 6 or not escape.startswith("\\u") or not _HEX.issuperset(escape[2:]):
        raise Malformed
    source.pos += 6
    out(escape)
    return int(escape[2:], 16)


def _object(source: Source, out: Emit, depth: int) -> Steps[None]:
    yield from source.expect("{")
    out("{")
    if (yield from json_space(source, out)) != "}":
        while True:
            yield from json_space(source, out)
            yield from json_string(source, out)
            yield from json_space(source, out)
            yield from source.expect(":")
            out(":")
            yield from json_value(source, out, depth + 1)
            if (yield from json_space(source, out)) != ",":
                break
            source.pos += 1
            out(",")
    yield from source.expect("}")
    out("}")


def _array(source: Source, out: Emit, depth: int) -> Steps[None]:
    yield from source.expect("[")
    out("[")
    if (yield from json_space(source, out)) != "]":
        while True:
            yield from json_value(source, out, depth + 1)
            if (yield from json_space(source, out)) != ",":
                break
            source.pos += 1
            out(",")
    yield from source.expect("]")
    out("]")
