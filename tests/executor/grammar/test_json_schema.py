from __future__ import annotations

import json

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.json_schema import for_xgrammar, simplified, why_inexact


def simple(schema):
    return simplified(json.dumps(schema))


def test_what_describes_is_left_out():
    schema = {"title": "T", "type": "string", "default": "x", "x-y": 1, "format": "password"}
    assert simple(schema) == {"type": "string"}


def test_a_property_may_be_called_as_a_keyword_is():
    schema = {
        "type": "object",
        "properties": {"title": {"type": "null"}, "type": {"title": "T", "const": 1}},
        "additionalProperties": True,
    }
    assert simple(schema)["properties"] == {"title": {"type": "null"}, "type": {"const": 1}}


def test_keywords_of_another_type_say_nothing():
    assert simple({"type": "null", "minLength": 3}) == {"type": "null"}


def test_objects_with_properties_are_closed_unless_they_are_a_part_of_one():
    one = {"type": "object", "properties": {"a": {"type": "null"}}}
    assert simple(one)["additionalProperties"] is False
    parts = simple({"allOf": [one, {"type": "object", "properties": {"b": {"type": "null"}}}]})
    assert all("additionalProperties" not in part for part in parts["allOf"])
    assert "additionalProperties" not in simple({"type": "object"})
    assert simple({**one, "additionalProperties": True})["additionalProperties"] is True


def test_one_of_several_that_exclude_each_other_is_any_of_them():
    def tagged(kind):
        properties = {"kind": {"const": kind}}
        return {"type": "object", "properties": properties, "required": ["kind"]}

    assert "anyOf" in simple({"oneOf": [tagged("a"), tagged("b")]})
    assert "anyOf" in simple({"oneOf": [{"type": "string"}, {"type": "null"}]})
    assert "anyOf" in simple({"oneOf": [{"const": 1}, {"type": "string"}]})
    assert "oneOf" in simple({"oneOf": [tagged("a"), tagged("a")]})
    assert "oneOf" in simple({"oneOf": [{"type": "integer"}, {"type": "number"}]})
    definitions = {"A": tagged("a"), "B": tagged("b")}
    references = [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]
    assert "anyOf" in simple({"oneOf": references, "$defs": definitions})


def test_tuples_of_older_drafts():
    schema = simple({"type": "array", "items": [{"type": "null"}], "additionalItems": False})
    assert schema == {"type": "array", "prefixItems": [{"type": "null"}], "items": False}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "strin"}, "strin"),
        ({"properties": []}, "properties"),
        ({"anyOf": {}}, "anyOf"),
        ({"items": 3}, "3"),
        ({"$ref": "other.json"}, "other.json"),
        ({"$ref": "#/none"}, "#/none"),
        ({"$ref": 3}, "$ref"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}}, "itself"),
    ],
)
def test_what_no_schema_can_have(schema, named):
    with pytest.raises(InvalidRequest) as caught:
        simple(schema)
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"minimum": 3}, "minimum without a type"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}, "minimum": 3}, "$ref beside minimum"),
        ({"enum": [1], "minimum": 3}, "enum beside minimum"),
        ({"type": "string", "pattern": "a", "minLength": 3}, "pattern beside minLength"),
        ({"type": "string", "format": "date"}, "date"),
        ({"type": "integer", "multipleOf": 3, "minimum": 1}, "multipleOf"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"type": "integer", "minimum": 2.5}, "2.5"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "required": ["a"]}, "required 'a'"),
        ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
        ({"allOf": [{}, {}]}, "allOf"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "not"),
    ],
)
def test_what_xgrammar_would_not_enforce(schema, named):
    assert named in (why_inexact(simple(schema)) or "")


def test_what_it_gets_is_what_it_gets_right():
    schema = {"type": "string", "minLength": 2, "maxLength": 4}
    assert for_xgrammar(schema) == {"type": "string", "pattern": "^.{2,4}$"}
    assert for_xgrammar({"type": ["string", "null"], "enum": ["a", 3, None]}) == {
        "enum": ["a", None]
    }
    assert for_xgrammar({"type": "integer", "enum": [1.0, 1.5, True]}) == {"enum": [1.0]}
    with pytest.raises(InvalidRequest, match="enum"):
        for_xgrammar({"type": "string", "enum": [3]})
