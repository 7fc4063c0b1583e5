"""Texts as values of the types that a schema allows."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.text.tools.argument_types import ALL_TYPES, property_schema, types_of, value_text

NUMBERS = {"integer", "number"}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": "number"}, NUMBERS),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"integer", "null"}),
        ({"oneOf": [{"type": "string"}, {"const": 3}]}, {"string"} | NUMBERS),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]}, {"string"}),
        ({"enum": ["a", 1, None]}, {"string", "null"} | NUMBERS),
        ({"type": "string", "enum": ["a", 1]}, {"string"}),
        ({"$ref": "#/$defs/a~1b"}, {"boolean"}),
        ({"$ref": "#/$defs/list/0"}, {"array"}),
        ({"$ref": "#/nowhere"}, ALL_TYPES),
        ({"$ref": "#/$defs/loop"}, ALL_TYPES),
        ({"properties": {}}, {"object"}),
        ({"items": {}}, {"array"}),
        ({"pattern": "a"}, {"string"}),
        ({"minimum": 3}, NUMBERS),
        ({"type": "integer", "nullable": True}, {"integer", "null"}),
        ({}, ALL_TYPES),
        (True, ALL_TYPES),
        (False, set()),
        ("nonsense", ALL_TYPES),
        ({"type": ["mystery"]}, ALL_TYPES),
    ],
)
def test_types_of(schema, types):
    root = {
        "$defs": {
            "a/b": {"type": "boolean"},
            "list": [{"type": "array"}],
            "loop": {"$ref": "#/$defs/loop"},
        }
    }
    assert types_of(schema, root) == types


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5),
        ("5", {"type": "string"}, "5"),
        ("5", {"type": ["string", "integer"]}, 5),
        ("05", {}, "05"),
        ("5.0", {"type": "integer"}, 5.0),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5.5", {"type": "number"}, 5.5),
        ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"),
        ("True", {"type": "boolean"}, True),
        ("True", {"type": ["boolean", "string"]}, "True"),
        ("yes", {"type": "boolean"}, "yes"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"type": ["integer", "null"]}, None),
        ("None", {"type": ["string", "null"]}, "None"),
        ("null", {"type": "string"}, "null"),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ('{"a": 1}', {"type": "string"}, '{"a": 1}'),
        ("[1, 2", {"type": "array"}, "[1, 2"),
        ("{}", {}, {}),
        ('"quoted"', {}, "quoted"),
        ('"quoted"', {"type": "string"}, '"quoted"'),
        ("plain words", {}, "plain words"),
        ("1", {"enum": ["1", 2]}, "1"),
        ("2", {"enum": ["1", 2]}, 2),
        ("true", {"const": True}, True),
        (" 5\n", {"type": "integer"}, 5),
        (" x ", {"type": "string"}, " x "),
    ],
)
def test_value_text(text, schema, value):
    assert json.loads(value_text(text, schema, {})) == value


@given(
    st.text(),
    st.sampled_from(
        [{}, *({"type": one} for one in sorted(ALL_TYPES)), {"type": ["integer", "string", "null"]}]
    ),
)
def test_any_text_becomes_json_and_none_is_lost(text, schema):
    written = value_text(text, schema, schema)
    value = json.loads(written)
    if isinstance(value, str):
        assert value == text or json.loads(text) == value


def test_properties_are_found_through_references_and_branches():
    root = {
        "$ref": "#/$defs/all",
        "$defs": {
            "all": {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"$ref": "#/$defs/b"}]},
            "b": {"properties": {"b": {"type": "null"}}, "additionalProperties": {"type": "array"}},
        },
    }
    assert property_schema(root, "a") == {"type": "integer"}
    assert property_schema(root, "b") == {"type": "null"}
    assert property_schema(root, "c") == {"type": "array"}
    assert property_schema({}, "c") == {}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("keyword", ["anyOf", "oneOf", "allOf"])
def test_branches_that_refer_to_one_another_have_an_end(keyword):
    branches = {keyword: [{"$ref": "#/$defs/a"}] * 10}
    root = {"$defs": {"a": branches}, **branches}
    assert types_of(root, root) == ALL_TYPES
    assert property_schema(root, "missing") == {}
