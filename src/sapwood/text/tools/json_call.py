"""Calls that are JSON objects: {"name": …, "arguments": {…}}, in either order."""

from __future__ import annotations

from collections.abc import Callable

from sapwood.text.json_source import decoded_string, json_value, parsed
from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource

_ARGUMENTS = frozenset({"arguments", "parameters"})
_PASSED_OVER = frozenset({"id", "type"})


def json_call(source: CallSource) -> Steps[None]:
    """Read one call; raises Malformed if the object has a key that calls do not have."""
    yield from source.space()
    yield from source.expect("{")
    seen: set[str] = set()
    name: str | None = None
    early: list[str] = []
    while True:
        if (yield from source.space()) == "}" and not seen:
            raise Malformed
        key = yield from decoded_string(source)
        kind = "arguments" if key in _ARGUMENTS else key
        if kind in seen:
            raise Malformed
        seen.add(kind)
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        if kind == "name":
            name = yield from decoded_string(source)
            source.start(name)
            for text in early:
                source.arguments(text)
        elif kind == "arguments":
            yield from json_arguments(source, early.append if name is None else source.arguments)
        elif kind in _PASSED_OVER:
            yield from json_value(source, _ignore)
        else:
            raise Malformed
        if (yield from source.space()) != ",":
            break
        source.pos += 1
    yield from source.expect("}")
    if name is None:
        raise Malformed
    if "arguments" not in seen:
        source.arguments("{}")
    source.end_call()


def json_call_list(source: CallSource) -> Steps[None]:
    """Read the calls of a JSON array, whose bracket has been read, and the bracket at its end."""
    while True:
        yield from json_call(source)
        if (yield from source.skips_after_space("]")):
            return
        # Not read unless a call follows: what comes of a broken one keeps its comma.
        if not (yield from source.skips_after_space(",")):
            raise Malformed


def json_arguments(source: CallSource, out: Callable[[str], None]) -> Steps[None]:
    """Read the arguments: an object, a string with the text of an object, or null for none."""
    first = yield from source.space()
    if first == "{":
        yield from json_value(source, out)
    elif first == '"':
        text = (yield from decoded_string(source)).strip()
        out(_object_text(text) if text else "{}")
    else:
        yield from source.expect("null")
        out("{}")


def json_call_of(source: CallSource, name: str, call_id: str | None = None) -> Steps[None]:
    """Read the arguments of a call whose name has been read already."""
    source.start(name, call_id)
    yield from json_arguments(source, source.arguments)
    source.end_call()


def _object_text(text: str) -> str:
    try:
        value = parsed(text)
    except ValueError as error:
        raise Malformed from error
    if not isinstance(value, dict):
        raise Malformed
    return text


def _ignore(text: str) -> None:
    return None
