from __future__ import annotations

import json

import msgspec
import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import MAX_DEPTH, Grammar, Thinking
from sapwood.schema.sampling import SamplingParams


def test_a_schema_keeps_the_order_of_its_properties():
    text = '{"type": "object", "properties": {"b": {}, "a": {"title": "ü"}}}'
    grammar = grammars.json_schema(text)
    assert grammar == grammars.json_schema(json.loads(text))
    assert grammar.text == '{"type":"object","properties":{"b":{},"a":{"title":"ü"}}}'


def test_the_two_forms_of_a_structural_tag_are_one():
    older = {
        "type": "structural_tag",
        "structures": [{"begin": "<f=x>", "schema": '{"type": "null"}', "end": "</f>"}],
        "triggers": ["<f="],
    }
    content = {"type": "json_schema", "json_schema": {"type": "null"}}
    tag = {"type": "tag", "begin": "<f=x>", "content": content, "end": "</f>"}
    newer = {"format": {"type": "triggered_tags", "triggers": ["<f="], "tags": [tag]}}
    assert grammars.structural_tag(older) == grammars.structural_tag(json.dumps(newer))


@pytest.mark.parametrize(
    ("make", "value", "said"),
    [
        (grammars.json_schema, "{", "json_schema is not valid JSON"),
        (grammars.json_schema, [], "json_schema must be a JSON Schema"),
        (grammars.json_schema, "3", "json_schema must be a JSON Schema"),
        (grammars.json_schema, "[" * 100_000, "deeper than"),
        (grammars.json_schema, {"a": json.loads("[" * 70 + "]" * 70)}, "deeper than"),
        (grammars.json_schema, r'{"const": "\ud800"}', "json_schema has half of a surrogate pair"),
        (grammars.regex, "", "regex is empty"),
        (grammars.ebnf, "", "ebnf is empty"),
        (grammars.choice, [], "choice must be a list of strings"),
        (grammars.choice, ["a", ""], "choice must be a list of strings"),
        (grammars.choice, ["a", 3], "choice must be a list of strings"),
        (grammars.choice, ["a"] * 5000, "at most 4096"),
        (grammars.structural_tag, "[]", "structural_tag must be an object"),
        (grammars.structural_tag, {}, "needs a format, or structures and triggers"),
        (grammars.structural_tag, {"format": {}}, "structural_tag.format must be an object"),
        (grammars.structural_tag, {"structures": [{}]}, "triggers must be a list"),
        (grammars.structural_tag, {"structures": [3], "triggers": ["<"]}, "structures[0] must be"),
        (grammars.structural_tag, {"structures": [{}], "triggers": ["<"]}, "needs begin and end"),
        (
            grammars.structural_tag,
            {"structures": [{"begin": "x", "end": ""}], "triggers": ["<"]},
            "starts with none of the triggers",
        ),
    ],
)
def test_what_is_malformed_is_refused(make, value, said):
    with pytest.raises(InvalidRequest) as caught:
        make(value)
    assert said in caught.value.message


def test_as_deep_as_allowed():
    schema: object = {}
    for _ in range(MAX_DEPTH - 1):
        schema = {"items": schema}
    grammars.json_schema(schema)
    with pytest.raises(InvalidRequest):
        grammars.json_schema({"items": {"items": schema}})


def test_a_grammar_crosses_processes():
    thinking = Thinking(begin="<think>", end="</think>", is_open=True)
    grammar = msgspec.structs.replace(grammars.regex("a"), thinking=thinking)
    params = SamplingParams(grammar=grammar)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert grammar.key == grammars.regex("a").key == ("regex", "a")


def test_thinking_needs_an_end():
    with pytest.raises(InvalidRequest, match="ends it"):
        Thinking(end="")


def test_ignore_eos_contradicts_a_grammar():
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        SamplingParams(grammar=grammars.regex("a"), ignore_eos=True)


def test_any_object():
    assert grammars.json_object() == Grammar(kind="json_schema", text='{"type":"object"}')
