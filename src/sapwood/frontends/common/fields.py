"""Strict fields: every field of a request is honoured, known to be harmless, or refused by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec
import orjson

from sapwood.base.errors import InvalidRequest, UnsupportedFeature

T = TypeVar("T", bound=msgspec.Struct)

# Bounded, because wire messages to the engine carry 64-bit integers and pages 32-bit token ids.
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
NumSamples = Annotated[int, msgspec.Meta(ge=1, le=128)]

_HARMLESS: tuple[object, ...] = (None, False, "", [], {})
_AT = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")
_MISSING = re.compile(r"Object missing required field `(\w+)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What becomes of fields that the request's struct does not have. null is always harmless.

    informational  accepted and without effect on the answer, by their meaning
    unsupported    name -> values that ask for nothing (besides null, false and empty ones);
                   any other value is refused
    """

    informational: frozenset[str] = frozenset()
    unsupported: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


def parse(body: Mapping[str, Any], shape: type[T], rules: Rules, *, where: str = "") -> T:
    """That body as a `shape`; a null counts as absent.

    where   the body's own path inside the request, such as "messages[0]"
    Raises  InvalidRequest or UnsupportedFeature that names the field
    """
    known = shape.__struct_fields__
    prefix = f"{where}." if where else ""
    given: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in rules.informational:
            continue
        if name in known:
            given[name] = value
        elif name in rules.unsupported:
            _refuse_unless_harmless(prefix + name, value, rules.unsupported[name])
        else:
            raise _unknown(name, prefix, [*known, *rules.informational])
    try:
        return msgspec.convert(given, shape, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explained(str(error), where) from None


def _refuse_unless_harmless(name: str, value: object, accepted: tuple[object, ...]) -> None:
    # 0 == False in Python, but logprobs=0 asks for log probabilities and logprobs=false does not.
    if any(
        type(value) is type(harmless) and value == harmless for harmless in (*_HARMLESS, *accepted)
    ):
        return
    or_set = f" or set it to {orjson.dumps(accepted[0]).decode()}" if accepted else ""
    raise UnsupportedFeature(
        f"{name} is not supported by this server; leave it out{or_set}", param=name
    )


def _unknown(name: str, prefix: str, known: list[str]) -> InvalidRequest:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; leave it out"
    return InvalidRequest(f"unknown field {prefix + name!r}{hint}", param=prefix + name)


def _explained(message: str, where: str) -> InvalidRequest:
    missing = _MISSING.match(message)
    if missing:
        path = _joined(where, missing[1])
        return InvalidRequest(f"{path} is required", param=path)
    at = _AT.search(message)
    path = _joined(where, at[1] if at else "")
    problem = _AT.sub("", message).replace("`", "")
    problem = problem[:1].lower() + problem[1:]
    return InvalidRequest(f"{path}: {problem}" if path else problem, param=path or None)


def _joined(where: str, path: str) -> str:
    return f"{where}.{path}" if where and path else where or path
