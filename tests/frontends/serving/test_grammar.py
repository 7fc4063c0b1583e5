"""Every way to ask for structured output, on every route that has it."""

from __future__ import annotations

import json

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.grammar import chosen_grammar, of_response_format
from sapwood.schema import grammar as grammars

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}
NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
TAG = {
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f>"],
}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


HALF = '{"const": "\\ud800"}'


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            "/generate",
            {"text": "a", "sampling_params": {"json_schema": HALF}},
            "sampling_params.json_schema",
        ),
        (
            "/generate",
            {
                "text": "a",
                "sampling_params": {
                    "structural_tag": f'{{"format": {{"type": "x", "y": {HALF}}}}}'
                },
            },
            "sampling_params.structural_tag",
        ),
        ("/v1/chat/completions", {**CHAT, "guided_json": HALF}, "guided_json"),
        ("/v1/completions", {"prompt": "a", "json_schema": HALF}, "json_schema"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_and_the_id_is_free_again(api, path, body, param):
    for _ in range(2):
        response = api.post(path, {**body, "rid": "mine"})
        error = response.json().get("error", response.json())
        assert (response.status_code, error["param"]) == (400, param)
        assert "half of a surrogate pair" in error["message"]


def test_formats():
    assert of_response_format({"type": "text"}) is None
    assert of_response_format({"type": "json_object"}) == grammars.json_object()
    assert of_response_format(NAMED) == grammars.json_schema(SCHEMA)
    loose = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": None}}
    assert of_response_format(loose) == grammars.json_schema(SCHEMA)
    tagged = {"type": "structural_tag", **TAG}
    assert of_response_format(tagged) == grammars.structural_tag(TAG)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "schema": SCHEMA}, "response_format.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA, "stric": 1}},
            "response_format.json_schema.stric",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": "yes"}},
            "response_format.json_schema.strict",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": [1]}},
            "response_format.json_schema.schema",
        ),
        ({"type": "json_object", "schema": SCHEMA}, "response_format.schema"),
        ({"type": "structural_tag"}, "response_format"),
    ],
)
def test_a_format_that_is_wrong_is_refused_by_name(given, param):
    with pytest.raises(InvalidRequest) as caught:
        of_response_format(given)
    assert caught.value.param == param


def test_only_one():
    assert chosen_grammar(regex=None) is None
    assert chosen_grammar({"type": "text"}, regex="a") == grammars.regex("a")
    with pytest.raises(InvalidRequest, match=r"p\.regex and p\.ebnf both"):
        chosen_grammar(regex="a", ebnf="root ::= b", where="p")
    with pytest.raises(InvalidRequest, match="response_format both"):
        chosen_grammar({"type": "json_object"}, regex="a")


def test_the_same_grammar_in_two_fields_is_one():
    same = {"guided_regex": "a", "structured_outputs.regex": "a"}
    assert chosen_grammar(**same) == grammars.regex("a")
    with pytest.raises(InvalidRequest, match=r"regex and guided_choice both"):
        chosen_grammar(**same, guided_choice=["b"])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": NAMED}, grammars.json_schema(SCHEMA)),
        ({"response_format": {"type": "json_object"}}, grammars.json_object()),
        ({"response_format": {"type": "text"}}, None),
        ({"json_schema": json.dumps(SCHEMA)}, grammars.json_schema(SCHEMA)),
        ({"regex": "a+"}, grammars.regex("a+")),
        ({"ebnf": "root ::= x"}, grammars.ebnf("root ::= x")),
        ({"structural_tag": TAG}, grammars.structural_tag(TAG)),
        ({"guided_json": SCHEMA}, grammars.json_schema(SCHEMA)),
        ({"guided_regex": "a+"}, grammars.regex("a+")),
        ({"guided_choice": ["a", "b"]}, grammars.choice(["a", "b"])),
        ({"guided_grammar": "root ::= x"}, grammars.ebnf("root ::= x")),
        ({"regex": None}, None),
    ],
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_openai(api, engine, route, fields, expected):
    body = CHAT if "chat" in route else {"prompt": "hi"}
    assert api.post(route, {**body, **fields}).status_code == 200
    assert engine.submitted[-1].options.sampling.grammar == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"json_schema": json.dumps(SCHEMA)}, grammars.json_schema(SCHEMA)),
        ({"regex": "a+"}, grammars.regex("a+")),
        ({"ebnf": "root ::= x"}, grammars.ebnf("root ::= x")),
        ({"structural_tag": json.dumps(TAG)}, grammars.structural_tag(TAG)),
        ({"structural_tag": TAG}, grammars.structural_tag(TAG)),
    ],
)
def test_native(api, engine, fields, expected):
    assert api.post("/generate", {"text": "hi", "sampling_params": fields}).status_code == 200
    assert engine.submitted[-1].options.sampling.grammar == expected


def test_native_batches_have_one_each(api, engine):
    body = {"text": ["a", "b"], "sampling_params": [{"regex": "x"}, {}]}
    assert api.post("/generate", body).status_code == 200
    assert [one.options.sampling.grammar for one in engine.submitted] == [grammars.regex("x"), None]
    body = {"text": ["a", "b"], "sampling_params": [{"regex": "x"}, {"regex": ""}]}
    error = api.post("/generate", body).json()["error"]
    assert error["param"] == "sampling_params[1].regex"


@pytest.mark.parametrize("route", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [("json", grammars.json_object()), (SCHEMA, grammars.json_schema(SCHEMA)), ("", None)],
)
def test_ollama(api, engine, route, given, expected):
    body = {"model": "org/tiny", "stream": False, "format": given}
    body |= CHAT if route == "/api/chat" else {"prompt": "hi"}
    assert api.post(route, body).status_code == 200
    assert engine.submitted[-1].options.sampling.grammar == expected
    wrong = api.post(route, {**body, "format": "xml"})
    assert wrong.status_code == 400
    assert "'xml'" in wrong.json()["error"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "xml"}},
        {"json_schema": "{"},
        {"regex": 3},
        {"regex": ""},
        {"guided_choice": []},
        {"regex": "a", "ignore_eos": True},
        {"regex": "a", "json_schema": "{}"},
    ],
)
def test_what_is_malformed_is_a_400_that_names_it(api, fields):
    answer = api.post("/v1/chat/completions", {**CHAT, **fields})
    assert answer.status_code == 400
    assert any(name in answer.json()["param"] for name in fields)
