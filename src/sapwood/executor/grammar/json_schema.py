"""JSON Schemas made simpler without changing what they demand, and which of them xgrammar can
enforce exactly.

xgrammar skips keywords, and combinations of keywords, that it does not know, with no more than a
warning. A schema must be enforced as it is, so `why_inexact` finds the schemas that xgrammar must
not get. Its rules were found by validating random outputs of random schemas, which
tests/executor/grammar does too.
Source: JSON Schema, draft 2020-12.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.patterns import why_not_plain

Schema = dict[str, Any] | bool

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = (
    "items",
    "additionalItems",
    "additionalProperties",
    "propertyNames",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_OF_TYPE: dict[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
    "number": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
    "array": frozenset(
        {
            "items",
            "prefixItems",
            "additionalItems",
            "minItems",
            "maxItems",
            "uniqueItems",
            "contains",
            "minContains",
            "maxContains",
            "unevaluatedItems",
        }
    ),
    "object": frozenset(
        {
            "properties",
            "patternProperties",
            "additionalProperties",
            "propertyNames",
            "required",
            "minProperties",
            "maxProperties",
            "dependentRequired",
            "dependentSchemas",
            "dependencies",
            "unevaluatedProperties",
        }
    ),
    "boolean": frozenset(),
    "null": frozenset(),
}
_ANY_TYPE = frozenset(
    {
        "type",
        "const",
        "enum",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "if",
        "then",
        "else",
        "$ref",
        "$dynamicRef",
        "$recursiveRef",
        "$defs",
        "definitions",
        "$schema",
        "$id",
        "$anchor",
    }
)
KEYWORDS = _ANY_TYPE.union(*_OF_TYPE.values())
"""What a schema can demand; other words in it describe."""
FORMATS = frozenset(
    {
        "date",
        "time",
        "date-time",
        "duration",
        "email",
        "idn-email",
        "hostname",
        "idn-hostname",
        "ipv4",
        "ipv6",
        "uri",
        "uri-reference",
        "iri",
        "iri-reference",
        "uri-template",
        "uuid",
        "json-pointer",
        "relative-json-pointer",
        "regex",
    }
)
"""The formats that the standard defines; others describe ("password", "int64")."""
_XGRAMMAR_FORMATS = frozenset({"date-time", "duration", "email", "hostname", "ipv6", "uri", "uuid"})


def simplified(text: str) -> Schema:
    """The schema without keywords that demand nothing; objects that list properties are closed,
    as by "additionalProperties": false.

    Raises InvalidRequest, naming the keyword, if a keyword has a value that no schema can have."""
    schema = json.loads(text)
    if not isinstance(schema, dict):
        return bool(schema)
    result = _simpler(schema, schema)
    assert isinstance(result, dict)
    _check_references(result)
    return result


def _simpler(schema: Any, root: Mapping[str, Any], *, in_all_of: bool = False) -> Any:
    if not isinstance(schema, dict):
        if isinstance(schema, bool):
            return schema
        raise InvalidRequest(f"a JSON Schema is an object, true or false, but one is {schema!r}")
    kept = {key: value for key, value in schema.items() if key in KEYWORDS}
    for word in ("$schema", "$id", "$anchor"):
        kept.pop(word, None)
    if kept.get("format") not in FORMATS:
        kept.pop("format", None)
    types = _types(kept)
    if types is not None:
        wanted = _ANY_TYPE.union(*(_OF_TYPE[name] for name in types))
        # A reference may point to a schema below `properties`, even where the type is no object.
        kept = {key: value for key, value in kept.items() if key in wanted or key in _MAPS}
    only = _only_all_of(kept)
    inside = in_all_of or ("allOf" in kept and not only)
    _simplify_parts(kept, root, in_all_of=inside)
    if only:
        (part,) = kept.pop("allOf")
        kept = {**part, **kept} if isinstance(part, dict) else kept
    if "oneOf" in kept and "anyOf" not in kept and _are_disjoint(kept["oneOf"], root):
        kept["anyOf"] = kept.pop("oneOf")
    if _may_be_closed(kept) and not inside:
        kept["additionalProperties"] = False
    return kept


def _simplify_parts(kept: dict[str, Any], root: Mapping[str, Any], *, in_all_of: bool) -> None:
    """Replace the subschemas of `kept` by simpler ones."""
    for word in _MAPS:
        if word in kept:
            inner = _object(kept[word], word)
            own = in_all_of and word not in ("$defs", "definitions")
            kept[word] = {
                key: _simpler(value, root, in_all_of=own and word == "dependentSchemas")
                for key, value in inner.items()
            }
    for word in _LISTS:
        if word in kept:
            if not isinstance(kept[word], list):
                raise InvalidRequest(f"{word} in a JSON Schema must be a list")
            # A part of a conjunction must leave the other parts' properties room.
            own = word != "prefixItems" and (in_all_of or len(kept) > 1)
            kept[word] = [_simpler(part, root, in_all_of=own) for part in kept[word]]
    for word in _SINGLE:
        if word in kept:
            if word == "items" and isinstance(kept[word], list):
                kept["prefixItems"] = [_simpler(part, root) for part in kept.pop("items")]
                if "additionalItems" in kept:
                    kept["items"] = _simpler(kept.pop("additionalItems"), root)
                continue
            own = word in ("not", "if", "then", "else")
            kept[word] = _simpler(kept[word], root, in_all_of=own)


def _only_all_of(kept: Mapping[str, Any]) -> bool:
    """Whether allOf has one part, and nothing beside it that the part could contradict."""
    parts = kept.get("allOf")
    return (
        isinstance(parts, list)
        and len(parts) == 1
        and set(kept)
        <= {
            "allOf",
            "$defs",
            "definitions",
        }
    )


def _may_be_closed(kept: Mapping[str, Any]) -> bool:
    beside = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames")
    combined = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
    return bool(kept.get("properties")) and not any(word in kept for word in (*beside, *combined))


def _object(value: Any, word: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{word} in a JSON Schema must be an object")
    return value


def _types(schema: Mapping[str, Any]) -> list[str] | None:
    given = schema.get("type")
    if given is None:
        return None
    types = given if isinstance(given, list) else [given]
    for name in types:
        if name not in _OF_TYPE:
            raise InvalidRequest(
                f"type in a JSON Schema is {name!r} but must be one of {', '.join(_OF_TYPE)}"
            )
    return types


# ---- references --------------------------------------------------------------------------------


def resolved(reference: str, root: Any) -> Any:
    """The schema that a local reference points to; InvalidRequest if there is none."""
    if not reference.startswith("#"):
        raise InvalidRequest(
            f"$ref {reference!r} points outside of the schema; put what it means into $defs"
        )
    found: Any = root
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise InvalidRequest(f"$ref {reference!r} points to nothing in the schema")
    return found


def _check_references(root: dict[str, Any]) -> None:
    for schema in walked(root):
        seen: set[str] = set()
        while isinstance(schema, dict) and "$ref" in schema:
            reference = schema["$ref"]
            if not isinstance(reference, str):
                raise InvalidRequest("$ref in a JSON Schema must be a string")
            if reference in seen:
                raise InvalidRequest(f"$ref {reference!r} refers to itself without an end")
            seen.add(reference)
            schema = resolved(reference, root)


def walked(schema: Any) -> Iterator[Any]:
    """The schema and all schemas in it."""
    waiting = [schema]
    while waiting:
        subschema = waiting.pop()
        yield subschema
        if not isinstance(subschema, dict):
            continue
        for word in _MAPS:
            waiting += subschema.get(word, {}).values()
        for word in _LISTS:
            waiting += subschema.get(word, [])
        waiting += [subschema[word] for word in _SINGLE if word in subschema]


# ---- oneOf -------------------------------------------------------------------------------------


def _are_disjoint(parts: list[Any], root: Mapping[str, Any]) -> bool:
    """Whether no value can match two of the parts, so that "one of" is "any of"."""
    followed = [_followed(part, root) for part in parts]
    if any(part is None for part in followed):
        return False
    known = [part for part in followed if part is not None]
    return _differ(known, _type_set) or any(
        _differ(known, lambda part, name=name: _fixed(part, name, root))  # type: ignore[misc]
        for name in _required_by_all(known)
    )


def _followed(part: Any, root: Mapping[str, Any]) -> dict[str, Any] | None:
    for _ in range(16):
        if isinstance(part, dict) and isinstance(part.get("$ref"), str):
            part = resolved(part["$ref"], root)
    return part if isinstance(part, dict) else None


def _differ(
    parts: list[dict[str, Any]], values: Callable[[dict[str, Any]], frozenset[str] | None]
) -> bool:
    seen: set[str] = set()
    for part in parts:
        own = values(part)
        if own is None or seen & own:
            return False
        seen |= own
    return True


def _type_set(part: Mapping[str, Any]) -> frozenset[str] | None:
    types = _types(part)
    if types is None:
        literal = _literals(part)
        return None if literal is None else frozenset(_type_of(value) for value in literal)
    # Every integer is a number too.
    return frozenset("number" if name == "integer" else name for name in types)


def _required_by_all(parts: list[dict[str, Any]]) -> list[str]:
    names = [
        set(part.get("required", ())) & set(part.get("properties", {}))
        if part.get("type") == "object"
        else set()
        for part in parts
    ]
    return sorted(set.intersection(*names)) if names else []


def _fixed(part: Mapping[str, Any], name: str, root: Mapping[str, Any]) -> frozenset[str] | None:
    """The values that a property may have, as JSON, if they are listed."""
    literals = _literals(_followed(part["properties"][name], root) or {})
    return None if literals is None else frozenset(json.dumps(value) for value in literals)


def _literals(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    listed = schema.get("enum")
    return listed if isinstance(listed, list) else None


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


# ---- what xgrammar can do ------------------------------------------------------------------------


def why_inexact(root: Schema) -> str | None:
    """Why xgrammar would not enforce exactly what a simplified schema demands; None: it would."""
    for schema in walked(root):
        if isinstance(schema, dict):
            reason = _why_inexact(schema)
            if reason is not None:
                return reason
    return None


def _why_inexact(schema: dict[str, Any]) -> str | None:
    words = set(schema) - {"$defs", "definitions"}
    for alone, companions in (
        ("$ref", set()),
        ("const", {"type"}),
        ("enum", {"type"}),
        ("anyOf", set()),
    ):
        if alone in words:
            beside = sorted(words - {alone} - companions)
            if beside:
                return f"{alone} beside {', '.join(beside)}"
            if alone == "$ref" and ("~" in schema["$ref"] or "%" in schema["$ref"]):
                return f"$ref {schema['$ref']!r}"
            if alone == "enum" and not isinstance(schema["enum"], list):
                raise InvalidRequest("enum in a JSON Schema must be a list")
            return None
    if not words:
        return None
    types = _types(schema)
    if types is None:
        return f"{min(words)} without a type"
    for word in sorted(words - {"type"}):
        if word in _ANY_TYPE:
            return word
    for name in types:
        reason = _INEXACT[name](schema) if name in _INEXACT else None
        if reason is not None:
            return reason
    return None


def _inexact_string(schema: Mapping[str, Any]) -> str | None:
    lengths = {"minLength", "maxLength"} & set(schema)
    if "pattern" in schema:
        if lengths or "format" in schema:
            return f"pattern beside {min(lengths | {'format'} & set(schema))}"
        problem = why_not_plain(str(schema["pattern"]))
        return None if problem is None else f"pattern {schema['pattern']!r} with {problem}"
    if "format" in schema:
        if lengths:
            return f"format beside {min(lengths)}"
        is_known = schema["format"] in _XGRAMMAR_FORMATS
        return None if is_known else f"format {schema['format']!r}"
    return None


def _inexact_number(schema: Mapping[str, Any]) -> str | None:
    return "multipleOf" if "multipleOf" in schema else None


def _inexact_integer(schema: Mapping[str, Any]) -> str | None:
    bounds = (_OF_TYPE["integer"] & set(schema)) - {"multipleOf"}
    if "multipleOf" in schema and bounds:
        return f"multipleOf beside {min(bounds)}"
    for word in _OF_TYPE["integer"] & set(schema):
        value = schema[word]
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            return f"{word} {value!r} of an integer"
        if abs(value) > 2**53:
            return f"{word} {value!r}, which is so large"
    return None


def _inexact_array(schema: Mapping[str, Any]) -> str | None:
    exact = {"items", "prefixItems", "minItems", "maxItems"}
    beside = (_OF_TYPE["array"] & set(schema)) - exact
    return min(beside) if beside else None


def _inexact_object(schema: Mapping[str, Any]) -> str | None:
    words = _OF_TYPE["object"] & set(schema)
    exact = {"properties", "required", "additionalProperties", "minProperties", "maxProperties"}
    beside = words - exact - {"patternProperties", "propertyNames"}
    if beside:
        return min(beside)
    for special in ("patternProperties", "propertyNames"):
        if special in words and words - {special, "additionalProperties"}:
            return f"{special} beside {min(words - {special, 'additionalProperties'})}"
    for pattern in schema.get("patternProperties", {}):
        if why_not_plain(pattern) is not None or not pattern.startswith("^"):
            return f"patternProperties {pattern!r}"
    missing = set(schema.get("required", ())) - set(schema.get("properties", {}))
    return f"required {min(missing)!r}, which is not in properties" if missing else None


_INEXACT: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "string": _inexact_string,
    "number": _inexact_number,
    "integer": _inexact_integer,
    "array": _inexact_array,
    "object": _inexact_object,
}


def for_xgrammar(schema: Schema) -> Schema:
    """A schema that xgrammar can enforce exactly (see `why_inexact`), in terms that it gets right.

    Where the length of a string is bounded, xgrammar allows control characters in it; so the bounds
    become a pattern, which forbids them. Beside enum, xgrammar ignores type; so the values of other
    types are left out here."""
    if isinstance(schema, bool):
        return schema
    result = dict(schema)
    for word in _MAPS:
        if word in result:
            result[word] = {key: for_xgrammar(value) for key, value in result[word].items()}
    for word in _LISTS:
        if word in result:
            result[word] = [for_xgrammar(part) for part in result[word]]
    for word in _SINGLE:
        if word in result:
            result[word] = for_xgrammar(result[word])
    types = _types(result)
    literals = _literals(result)
    if literals is not None:
        allowed = [value for value in literals if types is None or _has_type(value, types)]
        if not allowed:
            raise InvalidRequest("enum in the JSON Schema has no value of its type")
        kept: dict[str, Any] = {}
        for word in ("$defs", "definitions"):
            if word in result:
                kept[word] = result[word]
        return {**kept, "enum": allowed}
    if types is not None and "string" in types and {"minLength", "maxLength"} & set(result):
        least, most = result.pop("minLength", 0), result.pop("maxLength", None)
        result["pattern"] = f"^.{{{int(least)},{'' if most is None else int(most)}}}$"
    return result


def _has_type(value: Any, types: list[str]) -> bool:
    kind = _type_of(value)
    if kind != "number":
        return kind in types
    is_whole = isinstance(value, int) or (math.isfinite(value) and value == int(value))
    return "number" in types or ("integer" in types and is_whole)
