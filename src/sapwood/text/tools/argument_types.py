"""Which JSON types a schema allows, and which of these types a bare text has.

Formats that spell arguments as elements write every value as bare text; only the tool's schema says
whether `5` is a number or a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sapwood.text.json_source import mended_json, parsed
from sapwood.text.tools.python_literal import literal_json

ALL_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
STRING = frozenset({"string"})

_INTEGER = re.compile(r"[-+]?[0-9]{1,4000}")
_MAX_REFERENCES = 32
_MAX_REFERENCE_LENGTH = 1000
_MAX_SCHEMAS = 1000
"""Looked at for one argument: branches that refer to each other would have no end."""
_HINTS = {
    "properties": "object",
    "additionalProperties": "object",
    "required": "object",
    "patternProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "maxItems": "array",
    "uniqueItems": "array",
    "pattern": "string",
    "format": "string",
    "minLength": "string",
    "maxLength": "string",
    "minimum": "number",
    "maximum": "number",
    "exclusiveMinimum": "number",
    "exclusiveMaximum": "number",
    "multipleOf": "number",
}
"""Keywords that make sense for one type only; they tell the type of a schema without `type`."""


class _Walk:
    """Through the branches and references of a schema, only so deep and to only so many of them.

    root  the whole schema, which local references ("#/$defs/…") point into
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self._num_left = _MAX_SCHEMAS

    def may_visit(self, schema: Any, depth: int) -> bool:
        self._num_left -= 1
        return self._num_left >= 0 and depth <= _MAX_REFERENCES and isinstance(schema, Mapping)


def types_of(schema: Any, root: Any) -> frozenset[str]:
    """The types that the schema allows; all types if it does not restrict them.

    root  the whole schema, which local references ("#/$defs/…") point into
    """
    return _types_of(schema, _Walk(root), 0)


def _types_of(schema: Any, walk: _Walk, depth: int) -> frozenset[str]:
    if not walk.may_visit(schema, depth):
        return ALL_TYPES if schema is not False else frozenset()
    types = _declared(schema)
    if "enum" in schema and isinstance(schema["enum"], list):
        types &= frozenset().union(*(_type_of(value) for value in schema["enum"]))
    if "const" in schema:
        types &= _type_of(schema["const"])
    target = _referred(schema, walk.root)
    if target is not None:
        types &= _types_of(target, walk, depth + 1)
    for keyword in ("anyOf", "oneOf"):
        branches = schema.get(keyword)
        if isinstance(branches, list) and branches:
            each = (_types_of(branch, walk, depth + 1) for branch in branches)
            types &= frozenset().union(*each)
    branches = schema.get("allOf")
    if isinstance(branches, list):
        for branch in branches:
            types &= _types_of(branch, walk, depth + 1)
    if schema.get("nullable") is True:
        types |= {"null"}
    return types


def property_schema(parameters: Any, name: str) -> Any:
    """The schema of one argument; {} if the schema of all arguments does not mention it."""
    return _property(parameters, name, _Walk(parameters), 0) or {}


def has_property(parameters: Any, name: str) -> bool:
    """Whether the schema of all arguments allows an argument of this name."""
    if not isinstance(parameters, Mapping) or not parameters.get("properties"):
        return True
    return _property(parameters, name, _Walk(parameters), 0) is not None


def fits(value: Any, schema: Any) -> bool:
    """Whether the schema allows the value, and no property is one that the schema does not name.

    Compared are types, names of properties, `required`, `enum` and `const`.
    """
    return _fits(value, schema, _Walk(schema), 0)


def _fits(value: Any, schema: Any, walk: _Walk, depth: int) -> bool:
    if not walk.may_visit(schema, depth):
        return False
    if not _type_of(value) & _types_of(schema, _Walk(walk.root), 0):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if isinstance(schema.get("enum"), list) and value not in schema["enum"]:
        return False
    branches = [_referred(schema, walk.root)]
    branches = [*branches, *_listed(schema, "allOf")] if branches[0] else _listed(schema, "allOf")
    if not all(_fits(value, branch, walk, depth + 1) for branch in branches):
        return False
    for keyword in ("anyOf", "oneOf"):
        options = _listed(schema, keyword)
        if options and not any(_fits(value, option, walk, depth + 1) for option in options):
            return False
        branches += options
    return not isinstance(value, dict) or _properties_fit(
        value, schema, walk, depth, bool(branches)
    )


def _properties_fit(
    value: Mapping[str, Any],
    schema: Mapping[str, Any],
    walk: _Walk,
    depth: int,
    branches: bool,
) -> bool:
    """
    branches  whether other schemas, which were compared already, name properties too
    """
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    if not all(name in value for name in _listed(schema, "required")):
        return False
    others = schema.get("additionalProperties")
    for name, item in value.items():
        if name in properties:
            fitting = _fits(item, properties[name], walk, depth + 1)
        elif isinstance(others, Mapping):
            fitting = _fits(item, others, walk, depth + 1)
        else:
            # Below the arguments themselves a schema may leave properties open.
            fitting = others is True or branches or (depth > 0 and others is None)
        if not fitting:
            return False
    return True


def _listed(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    given = schema.get(keyword)
    return list(given) if isinstance(given, list) else []


def value_text(text: str, schema: Any, root: Any) -> str:
    """The text as JSON of a type that the schema allows; a JSON string if no other type fits."""
    chosen = _enumerated(text, schema, root)
    if chosen is not None:
        return chosen
    types = types_of(schema, root)
    for kind in ("null", "boolean", "integer", "number", "container"):
        value = _READERS[kind](text.strip(), types)
        if value is not None:
            return value
    if types == ALL_TYPES:
        quoted = _json_of(text.strip(), str)
        if quoted is not None:
            return quoted
    return json.dumps(text, ensure_ascii=False)


def _declared(schema: Mapping[str, Any]) -> frozenset[str]:
    declared = schema.get("type")
    names = [declared] if isinstance(declared, str) else declared
    if isinstance(names, list) and names:
        given = frozenset(name for name in names if isinstance(name, str)) & ALL_TYPES
        return given | {"integer"} if "number" in given else given or ALL_TYPES
    hinted = {_HINTS[keyword] for keyword in schema if keyword in _HINTS}
    if "number" in hinted:
        hinted.add("integer")
    return frozenset(hinted) or ALL_TYPES


def _type_of(value: Any) -> frozenset[str]:
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    names = {float: "number", str: "string", list: "array", dict: "object"}
    return frozenset({names.get(type(value), "string")})


def _referred(schema: Mapping[str, Any], root: Any) -> Any:
    """The schema that a local $ref points at; None if there is no such schema."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    if len(reference) > _MAX_REFERENCE_LENGTH:
        return None
    target = root
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, Mapping) and key in target:
            target = target[key]
        else:
            return None
    return target


def _property(schema: Any, name: str, walk: _Walk, depth: int) -> Any:
    if not walk.may_visit(schema, depth):
        return None
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    branches = [_referred(schema, walk.root)]
    for keyword in ("allOf", "anyOf", "oneOf"):
        given = schema.get(keyword)
        branches += given if isinstance(given, list) else []
    for branch in branches:
        found = _property(branch, name, walk, depth + 1)
        if found is not None:
            return found
    others = schema.get("additionalProperties")
    return others if isinstance(others, Mapping) else None


def _enumerated(text: str, schema: Any, root: Any) -> str | None:
    """The value of the schema's `enum` or `const` that the text spells."""
    for _ in range(_MAX_REFERENCES):
        target = _referred(schema, root) if isinstance(schema, Mapping) else None
        if target is None:
            break
        schema = target
    if not isinstance(schema, Mapping):
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    for value in values if isinstance(values, list) else []:
        spelled = json.dumps(value, ensure_ascii=False)
        if (isinstance(value, str) and value == text) or spelled == text.strip():
            return spelled
    return None


def _null(text: str, types: frozenset[str]) -> str | None:
    words = ("null",) if "string" in types else ("null", "none")
    return "null" if "null" in types and text.lower() in words else None


def _boolean(text: str, types: frozenset[str]) -> str | None:
    if "boolean" not in types:
        return None
    # If the value may be a string too, only JSON's own spelling counts as a boolean.
    word = text if "string" in types else text.lower()
    return word if word in ("true", "false") else None


def _integer(text: str, types: frozenset[str]) -> str | None:
    is_one = "integer" in types and _INTEGER.fullmatch(text) is not None
    if not is_one or (types == ALL_TYPES and text != str(int(text))):
        return None
    return str(int(text))


def _number(text: str, types: frozenset[str]) -> str | None:
    if "number" in types:
        return _json_of(text, int, float)
    if "integer" in types:
        # 5.0 is an integer in JSON's eyes.
        value = _json_of(text, float)
        return value if value is not None and float(value).is_integer() else None
    return None


def _container(text: str, types: frozenset[str]) -> str | None:
    kinds = [kind for name, kind in (("array", list), ("object", dict)) if name in types]
    if not kinds:
        return None
    value = _json_of(text, *kinds)
    if value is not None or "string" in types:
        return value
    # Nothing but an array or an object will do, so that other spellings of one are read too.
    for read in (mended_json, literal_json, _unescaped):
        spelled = read(text)
        if spelled is not None and (value := _json_of(spelled, *kinds)) is not None:
            return value
    return None


def _unescaped(text: str) -> str | None:
    """The text without one level of JSON's escapes, such as [{\\"a\\": 1}]; None if it has none."""
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return None


def _json_of(text: str, *kinds: type) -> str | None:
    """The text itself if it is JSON of one of those Python types."""
    try:
        value = parsed(text)
    except ValueError:
        return None
    return text if type(value) in kinds else None


_READERS = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "container": _container,
}
