from __future__ import annotations

import json

import jsonschema
import pytest

from sapwood.schema.tool_grammar import moved, tool_call_list

WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer"}},
    "required": ["city"],
    "$defs": {"City": {"enum": ["Oslo", "Rome"]}},
}
TREE = {"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False}


def is_valid(grammar, value) -> bool:
    return jsonschema.Draft202012Validator(json.loads(grammar.text)).is_valid(value)


def call(name, **parameters):
    return {"name": name, "parameters": parameters}


def test_each_tool_has_its_own_parameters():
    grammar = tool_call_list([("weather", WEATHER), ("tree", TREE), ("any", True)])
    assert is_valid(grammar, [call("weather", city="Oslo", days=3), call("any", x=1)])
    assert is_valid(grammar, [call("tree", child={"child": {}})])
    assert not is_valid(grammar, [])
    assert not is_valid(grammar, [call("weather", city="Paris")])
    assert not is_valid(grammar, [call("tree", child={"other": 1})])
    assert not is_valid(grammar, [call("unknown")])


def test_one_call_only():
    grammar = tool_call_list([("weather", WEATHER)], at_most_one=True)
    assert is_valid(grammar, [call("weather", city="Rome")])
    assert not is_valid(grammar, [call("weather", city="Rome")] * 2)


def test_references_to_elsewhere_stay():
    schema = {"$ref": "http://x/y", "items": [{"$ref": "#/a"}, 3], "const": "#/a"}
    assert moved(schema, "#/b") == {
        "$ref": "http://x/y",
        "items": [{"$ref": "#/b/a"}, 3],
        "const": "#/a",
    }


@pytest.mark.parametrize("name", ["xgrammar", "llguidance"])
def test_both_backends_have_it(tmp_path, name):
    from sapwood.executor.grammar.backends import make_backend
    from sapwood.executor.grammar.vocabulary import vocabulary_of
    from sapwood.schema.config.grammar import GrammarConfig
    from sapwood.text.tokenizer import Tokenizer
    from tests.tiny import VOCAB, write_tokenizer

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    vocabulary = vocabulary_of(tokenizer, size=VOCAB, ends=[257])
    backend = make_backend(GrammarConfig(grammar_backend=name), vocabulary)
    compiled = backend.compile(tool_call_list([("weather", WEATHER), ("tree", TREE)]))
    for text, fits in (
        ('[{"name": "weather", "parameters": {"city": "Rome"}}]', True),
        ('[{"name": "tree", "parameters": {"child": {"child": {}}}}]', True),
        ('[{"name": "weather", "parameters": {"city": "Paris"}}]', False),
    ):
        matcher = compiled.matcher()
        assert all(matcher.accept(one) for one in vocabulary.encode(text)) is fits
