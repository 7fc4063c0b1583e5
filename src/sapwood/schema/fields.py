"""The fields of a request: one table per JSON object says what becomes of each of them.

Every field is honoured, known to change nothing, or asks for something that the server does not
do. Requests with such a field, or with an unknown one, are refused by its name; a server with
`--unsupported-fields warn` answers without the field instead, and names it (unsupported.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import msgspec
import orjson

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.schema.unsupported import refuse

T = TypeVar("T", bound=msgspec.Struct)

# Bounded, because wire messages to the engine carry 64-bit integers and pages 32-bit token ids.
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
PenaltyWindow = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]

_EMPTY: tuple[object, ...] = (None, False, "", [], {})
_AT = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_FIRST_NAME = re.compile(r"^\w+")
_MAX_NAME_CHARS = 64
"""Looking for a similar name takes time that grows with the name, and no field's is longer."""


_TRUTHS = dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True) | dict.fromkeys(
    ("0", "off", "f", "false", "n", "no"), False
)
"""What pydantic reads as truth values, in any case. Source: pydantic, "Conversion Table"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotOffered:
    """A known field that asks for what the server does not do.

    why   the reason, after "NAME is not supported: "
    idle  values that ask for nothing, besides null, false and empty ones; where true is one of
          them, false asks for something unless it is listed as well
    """

    why: str
    idle: tuple[object, ...] = ()

    def is_idle(self, value: object) -> bool:
        is_on_by_default = _is_among(True, self.idle)
        return _is_among(value, self.idle) or (
            _is_among(value, _EMPTY) and not (value is False and is_on_by_default)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """Another dialect's name of a field that is honoured.

    of    the honoured field's name
    idle  values that mean the same as leaving the field out
    """

    of: str
    idle: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldTable(Generic[T]):
    """All known fields of one JSON object. null counts as absent everywhere.

    title        where the object is, for the documentation: a route or a field's path
    shape        struct of the honoured fields, with their types and defaults
    changes_nothing  name -> why every value of the field is accepted without effect
    not_offered  name -> what the field asks for in vain, and values that do not ask for it
    left_out     values of honoured fields that mean the same as leaving the field out
    aliases      other names of honoured fields
    nested       honoured fields that are objects with a table of their own
    coerces      whether texts stand for numbers and truth values, as in servers that check their
                 requests with pydantic
    """

    title: str
    shape: type[T]
    changes_nothing: Mapping[str, str] = field(default_factory=dict)
    not_offered: Mapping[str, NotOffered] = field(default_factory=dict)
    left_out: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    nested: Mapping[str, FieldTable[Any]] = field(default_factory=dict)
    coerces: bool = True

    def __post_init__(self) -> None:
        lists = (self.shape.__struct_fields__, self.changes_nothing, self.not_offered, self.aliases)
        names = [name for names in lists for name in names]
        twice = {name for name in names if names.count(name) > 1}
        if not set(self.left_out) <= set(self.shape.__struct_fields__):
            raise ValueError(f"{self.title}: left_out names fields that are not honoured")
        if twice:
            raise ValueError(f"{self.title}: {', '.join(sorted(twice))} in the table twice")

    @property
    def names(self) -> list[str]:
        """All known names, the honoured ones first."""
        return [
            *self.shape.__struct_fields__,
            *self.aliases,
            *self.changes_nothing,
            *self.not_offered,
        ]


def parse(body: Mapping[str, Any], table: FieldTable[T], *, where: str = "") -> T:
    """That body as the table's struct.

    where   the body's own path inside the request, such as "messages[0]"
    Raises  InvalidRequest or UnsupportedFeature that names the field
    """
    given, called = _honoured(body, table, where)
    try:
        return msgspec.convert(given, table.shape, str_keys=True, strict=not table.coerces)
    except msgspec.ValidationError as error:
        raise _explained(str(error), where, called) from None


def _honoured(
    body: Mapping[str, Any], table: FieldTable[Any], where: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the honoured fields, for some of them the other name that the client gave them)"""
    prefix = f"{where}." if where else ""
    honoured = table.shape.__struct_fields__
    shape: Any = table.shape
    truths = _truth_fields(shape) if table.coerces else frozenset[str]()
    given: dict[str, Any] = {}
    called: dict[str, str] = {}
    for name, value in body.items():
        if value is None or name in table.changes_nothing:
            continue
        if _is_among(value, table.left_out.get(name, ())):
            continue
        if name in honoured:
            given[name] = _truth(value) if name in truths else value
            if name in table.nested and isinstance(value, Mapping):
                given[name], _ = _honoured(value, table.nested[name], prefix + name)
        elif name in table.aliases:
            alias = table.aliases[name]
            if not _is_among(value, alias.idle):
                other = called.setdefault(alias.of, name)
                _check_same(prefix, name, other, value, body[other])
        elif name in table.not_offered:
            _refuse_unless_idle(prefix + name, value, table.not_offered[name])
        else:
            refuse(_unknown(name, prefix, table.names), name=prefix + name)
    for name, other in called.items():
        _check_same(prefix, other, name, body[other], given.get(name, body[other]))
        given[name] = body[other]
    return given, called


@cache
def _truth_fields(shape: Any) -> frozenset[str]:
    """The fields of a struct's class that are a truth value, or absent, and nothing else."""
    hints = get_type_hints(shape)
    return frozenset(name for name, hint in hints.items() if hint in (bool, bool | None))


def _truth(value: object) -> object:
    """A text that pydantic reads as a truth value becomes one; everything else stays."""
    return _TRUTHS.get(value.lower(), value) if isinstance(value, str) else value


def _check_same(prefix: str, name: str, other: str, value: object, other_value: object) -> None:
    if value != other_value:
        raise InvalidRequest(
            f"{prefix}{name} is another name of {prefix}{other}, but their values differ; send one "
            "of them",
            param=prefix + name,
        )


def _refuse_unless_idle(name: str, value: object, asked: NotOffered) -> None:
    if asked.is_idle(value):
        return
    # Every prompt of a batch may have a value of its own.
    if isinstance(value, list) and all(
        _is_among(one, (None, False, *asked.idle)) and asked.is_idle(one) for one in value
    ):
        return
    or_set = f" or set it to {orjson.dumps(asked.idle[0]).decode()}" if asked.idle else ""
    refuse(
        UnsupportedFeature(
            f"{name} is not supported by this server: {asked.why}; leave it out{or_set}", param=name
        )
    )


def _is_among(value: object, values: tuple[object, ...]) -> bool:
    """Whether the value is one of them. An integer may be written as a float.

    0 == False in Python, but logprobs=0 asks for log probabilities and logprobs=false does not.
    """
    return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in values)


def _unknown(name: str, prefix: str, known: list[str]) -> InvalidRequest:
    close = difflib.get_close_matches(name, known, n=1) if len(name) <= _MAX_NAME_CHARS else []
    hint = f"; did you mean {close[0]!r}?" if close else "; leave it out"
    return InvalidRequest(f"unknown field {prefix + name!r}{hint}", param=prefix + name)


def _explained(message: str, where: str, called: Mapping[str, str]) -> InvalidRequest:
    """called: honoured field -> the name that the client gave it"""
    missing = _MISSING.match(message)
    if missing:
        path = _joined(where, missing[1])
        return InvalidRequest(f"{path} is required", param=path)
    at = _AT.search(message)
    inside = _FIRST_NAME.sub(lambda name: called.get(name[0], name[0]), at[1]) if at else ""
    path = _joined(where, inside)
    problem = _AT.sub("", message).replace("`", "")
    problem = problem[:1].lower() + problem[1:]
    return InvalidRequest(f"{path}: {problem}" if path else problem, param=path or None)


def _joined(where: str, path: str) -> str:
    return f"{where}.{path}" if where and path else where or path
