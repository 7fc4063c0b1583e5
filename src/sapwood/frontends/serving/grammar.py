"""The ways in which clients ask for structured output -> a grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sapwood.base.errors import InvalidRequest
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import Grammar
from sapwood.schema.unsupported import refuse


def _any_object(_: bool, *, param: str) -> Grammar:
    return grammars.json_object()


_MAKERS: dict[str, Callable[..., Grammar]] = {
    "json_schema": grammars.json_schema,
    "regex": grammars.regex,
    "ebnf": grammars.ebnf,
    "structural_tag": grammars.structural_tag,
    # What vLLM's clients send.
    "guided_json": grammars.json_schema,
    "guided_regex": grammars.regex,
    "guided_grammar": grammars.ebnf,
    "guided_choice": grammars.choice,
    "structured_outputs.json": grammars.json_schema,
    "structured_outputs.regex": grammars.regex,
    "structured_outputs.grammar": grammars.ebnf,
    "structured_outputs.choice": grammars.choice,
    "structured_outputs.json_object": _any_object,
    "structured_outputs.structural_tag": grammars.structural_tag,
}


def chosen_grammar(
    response_format: Mapping[str, Any] | None = None, *, where: str = "", **given: Any
) -> Grammar | None:
    """The one grammar that a request asks for; None if it asks for none.

    given   fields of the names above, None where they are absent
    where   path of the fields in the request, such as "sampling_params"
    Raises  InvalidRequest that names the field; also if there are two different grammars
    """
    prefix = f"{where}." if where else ""
    asked = {name: value for name, value in given.items() if value is not None}
    found: dict[str, Grammar] = {
        name: _MAKERS[name](value, param=prefix + name) for name, value in asked.items()
    }
    if response_format is not None:
        by_format = of_response_format(response_format, f"{prefix}response_format")
        if by_format is not None:
            found["response_format"] = by_format
    first = next(iter(found), "")
    # Clients of vLLM send its older and its newer field together, with one meaning.
    second = next((name for name, grammar in found.items() if grammar != found[first]), None)
    if second is not None:
        raise InvalidRequest(
            f"{prefix}{first} and {prefix}{second} both say what the output must look like; send "
            "one of them",
            param=prefix + second,
        )
    return next(iter(found.values()), None)


def of_response_format(given: Mapping[str, Any], param: str = "response_format") -> Grammar | None:
    """OpenAI's response_format, and SGLang's structural_tag in it. A schema is always enforced,
    whether `strict` is true or not."""
    kind = given.get("type")
    if kind == "text":
        _refuse_others(given, {"type"}, param)
        return None
    if kind == "json_object":
        _refuse_others(given, {"type"}, param)
        return grammars.json_object()
    if kind == "json_schema":
        return _of_named_schema(given, param)
    if kind == "structural_tag":
        known = {"type", "structures", "triggers", "format"}
        _refuse_others(given, known, param)
        tag = {name: value for name, value in given.items() if name in known}
        return grammars.structural_tag(tag, param=param)
    raise InvalidRequest(
        f"{param}.type is {kind!r} but must be one of text, json_object, json_schema, "
        "structural_tag",
        param=f"{param}.type",
    )


def _of_named_schema(given: Mapping[str, Any], param: str) -> Grammar:
    _refuse_others(given, {"type", "json_schema"}, param)
    named = given.get("json_schema")
    path = f"{param}.json_schema"
    if not isinstance(named, Mapping):
        raise InvalidRequest(f"{path} is required, an object with a schema", param=path)
    _refuse_others(named, {"name", "description", "schema", "strict"}, path)
    if named.get("schema") is None:
        raise InvalidRequest(f"{path}.schema is required", param=f"{path}.schema")
    if not isinstance(named.get("strict", False), bool | None):
        raise InvalidRequest(f"{path}.strict must be true or false", param=f"{path}.strict")
    return grammars.json_schema(named["schema"], param=f"{path}.schema")


def _refuse_others(given: Mapping[str, Any], known: set[str], path: str) -> None:
    for name, value in given.items():
        if name not in known and value is not None:
            refuse(InvalidRequest(f"unknown field {f'{path}.{name}'!r}", param=f"{path}.{name}"))
