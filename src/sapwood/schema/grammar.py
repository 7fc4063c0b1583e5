"""Grammars: what an output must look like, before a backend compiles it for a vocabulary.

A grammar is a kind and a text, and compiled grammars are cached by these two. The functions here
make grammars of the fields that clients send. They refuse malformed fields; whether a grammar can
be enforced is for the backend to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.base.nesting import is_deeper
from sapwood.schema import limits

Kind = Literal["json_schema", "regex", "ebnf", "structural_tag", "choice"]

MAX_DEPTH = limits.SCHEMA_DEPTH.most
"""Levels of nesting in a schema or a structural tag."""


class Thinking(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Reasoning before the part of an output that a grammar constrains.

    The reasoning itself is free, but may not end the output. A model that does not think is held
    to the grammar from its first token on.

    begin    the text that opens the reasoning ("<think>"); empty: the output cannot open it
    end      the text that closes it ("</think>"); the grammar starts after that text
    is_open  whether the prompt has opened the reasoning already
    """

    end: str
    begin: str = ""
    is_open: bool = False

    def __post_init__(self) -> None:
        if not self.end:
            raise InvalidRequest("the reasoning before a grammar needs something that ends it")


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an output must match, as a whole and from its first token on.

    kind      json_schema: text is a JSON Schema, draft 2020-12; regex: a regular expression;
              ebnf: a grammar in GBNF, its first rule called root; structural_tag: see
              `structural_tag`; choice: a JSON list of strings
    thinking  the reasoning that may come before; None: none may
    """

    kind: Kind
    text: str
    thinking: Thinking | None = None

    def __post_init__(self) -> None:
        _check_unicode(self.text, self.kind)

    @property
    def key(self) -> tuple[str, str]:
        """Two grammars with the same key are the same grammar, and are compiled once."""
        return self.kind, self.text


def json_schema(schema: object, *, param: str = "json_schema") -> Grammar:
    """A grammar of the JSON that a schema describes.

    schema  a JSON Schema as an object, as true or false, or as JSON text

    Properties are put out in the order in which the schema has them."""
    value = _parsed(schema, param) if isinstance(schema, str) else schema
    if not isinstance(value, Mapping | bool):
        raise InvalidRequest(f"{param} must be a JSON Schema, which is an object", param=param)
    return Grammar(kind="json_schema", text=_canonical(value, param))


def json_object() -> Grammar:
    """Any JSON object."""
    return Grammar(kind="json_schema", text='{"type":"object"}')


def regex(text: str, *, param: str = "regex") -> Grammar:
    return Grammar(kind="regex", text=_not_empty(text, param))


def ebnf(text: str, *, param: str = "ebnf") -> Grammar:
    return Grammar(kind="ebnf", text=_not_empty(text, param))


def choice(options: Sequence[str], *, param: str = "choice") -> Grammar:
    """One of those strings."""
    if not options or not all(isinstance(option, str) and option for option in options):
        raise InvalidRequest(f"{param} must be a list of strings, none of them empty", param=param)
    limits.CHOICES.check(len(options), param, hint="use a regex or an ebnf")
    return Grammar(kind="choice", text=_canonical(list(options), param))


def structural_tag(tag: object, *, param: str = "structural_tag") -> Grammar:
    """Free text in which certain beginnings, once written, determine the text after them.

    tag   {"structures": [{"begin", "schema", "end"}, …], "triggers": […]}, or {"format": {…}} with
          xgrammar's formats; an object or JSON text; "type" may be left out
    """
    value = _parsed(tag, param) if isinstance(tag, str) else tag
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{param} must be an object", param=param)
    if "format" in value:
        form: object = value["format"]
        if not isinstance(form, Mapping) or not isinstance(form.get("type"), str):
            raise InvalidRequest(f"{param}.format must be an object with a type", param=param)
    else:
        form = _triggered_tags(value, param)
    canonical = {"type": "structural_tag", "format": form}
    return Grammar(kind="structural_tag", text=_canonical(canonical, param))


def as_format(grammar: Grammar, *, param: str = "structural_tag") -> dict[str, object]:
    """The grammar as a format within a structural tag; InvalidRequest if it cannot be a format."""
    match grammar.kind:
        case "json_schema":
            return {"type": "json_schema", "json_schema": json.loads(grammar.text)}
        case "regex":
            return {"type": "regex", "pattern": grammar.text}
        case "choice":
            options = [
                {"type": "const_string", "value": option} for option in json.loads(grammar.text)
            ]
            return {"type": "or", "elements": options}
        case "structural_tag":
            form: dict[str, object] = json.loads(grammar.text)["format"]
            return form
        case _:
            raise InvalidRequest(
                f"{param}: an {grammar.kind} grammar cannot stand beside calls of tools; use a "
                'JSON schema or a regex, or tool_choice "none"',
                param=param,
            )


def _triggered_tags(value: Mapping[str, Any], param: str) -> dict[str, object]:
    """A structural tag of the older form, with structures and triggers, in the newer form."""
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not structures:
        raise InvalidRequest(
            f"{param} needs a format, or structures and triggers; structures must be a list of "
            "objects with begin, schema and end",
            param=param,
        )
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise InvalidRequest(f"{param}.triggers must be a list of strings", param=param)
    tags: list[dict[str, object]] = []
    for position, structure in enumerate(structures):
        where = f"{param}.structures[{position}]"
        if not isinstance(structure, Mapping):
            raise InvalidRequest(f"{where} must be an object", param=param)
        begin, end = structure.get("begin"), structure.get("end")
        schema = structure.get("schema", True)
        if not isinstance(begin, str) or not isinstance(end, str):
            raise InvalidRequest(f"{where} needs begin and end, both strings", param=param)
        if not any(begin.startswith(trigger) for trigger in triggers):
            raise InvalidRequest(
                f"{where}.begin {begin!r} starts with none of the triggers", param=param
            )
        if isinstance(schema, str):
            schema = _parsed(schema, f"{where}.schema")
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"type": "tag", "begin": begin, "content": content, "end": end})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


def _not_empty(text: str, param: str) -> str:
    if not text:
        raise InvalidRequest(f"{param} is empty; leave it out", param=param)
    _check_unicode(text, param)
    return text


def _check_unicode(text: str, param: str) -> None:
    """A body's JSON has no halves of surrogate pairs, but JSON in one of its strings may."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} is not valid Unicode: it has half of a surrogate pair, "
            f"\\u{ord(text[error.start]):04x}, which UTF-8 cannot hold; leave it out or write the "
            "other half too",
            param=param,
        ) from None


def _parsed(text: str, param: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise InvalidRequest(f"{param} is not valid JSON: {error}", param=param) from None
    except RecursionError:
        raise _too_deep(param) from None


def _canonical(value: object, param: str) -> str:
    if is_deeper(value, MAX_DEPTH):
        raise _too_deep(param)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    _check_unicode(text, param)
    return text


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _too_deep(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is nested deeper than {MAX_DEPTH} levels", param=param)
