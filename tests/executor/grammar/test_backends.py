"""What both backends let through, checked by other means: jsonschema and Python's re."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import jsonschema
import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.backends import FirstThatCan, make_backend
from sapwood.executor.grammar.interface import GrammarFailed
from sapwood.executor.grammar.llguidance_backend import LLGuidanceBackend
from sapwood.schema import grammar as grammars
from sapwood.schema.config.grammar import GrammarConfig
from tests.executor.grammar.conftest import EOS, allowed
from tests.executor.grammar.schemas import random_ebnf, random_regex, random_schema
from tests.tiny import VOCAB, write_tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.mark.parametrize("odd", [0.0, 0.3])
def test_whatever_ends_validates(backend, walk, odd):
    num_ended = num_compiled = 0
    for seed in range(60):
        schema = random_schema(random.Random(seed), odd=odd)
        try:
            compiled = backend.compile(grammars.json_schema(schema))
        except InvalidRequest:
            continue
        num_compiled += 1
        rng = random.Random(seed)
        for _ in range(3):
            text, has_ended = walk(compiled, rng)
            if has_ended:
                num_ended += 1
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert num_compiled >= (30 if odd == 0.0 else 10)
    assert num_ended >= num_compiled


def test_the_general_one_knows_every_usual_schema(vocabulary):
    backend = make_backend(GrammarConfig(), vocabulary)
    for seed in range(100):
        backend.compile(grammars.json_schema(random_schema(random.Random(seed))))


def test_regexes(backend, walk):
    for seed in range(60):
        rng = random.Random(seed)
        pattern = random_regex(rng)
        compiled = backend.compile(grammars.regex(pattern))
        for _ in range(3):
            text, has_ended = walk(compiled, rng, 200)
            assert not has_ended or re.fullmatch(pattern, text, re.DOTALL), (pattern, text)


def test_ebnf(backend, walk):
    for seed in range(40):
        rng = random.Random(seed)
        text, meaning = random_ebnf(rng)
        compiled = backend.compile(grammars.ebnf(text))
        for _ in range(3):
            output, has_ended = walk(compiled, rng, 200)
            assert not has_ended or re.fullmatch(meaning, output, re.DOTALL), (text, output)


def test_recursive_ebnf(backend, accepts):
    compiled = backend.compile(grammars.ebnf('root ::= "(" root ")" | "x"\n'))
    assert accepts(compiled, "((x))")
    assert not accepts(compiled, "((x)")


def test_lark_as_guidance_sends_it(vocabulary, accepts):
    backend = make_backend(GrammarConfig(), vocabulary)
    compiled = backend.compile(grammars.ebnf('%llguidance {}\n\nstart: "yes" | /[0-9]{2}/\n'))
    assert accepts(compiled, "yes")
    assert accepts(compiled, "42")
    assert not accepts(compiled, "4")


def test_choice(backend, accepts):
    options = ["yes", "no", 'a "quote"', "line\nbreak", "größe", "back\\slash", "ye"]
    compiled = backend.compile(grammars.choice(options))
    for one in options:
        assert accepts(compiled, one)
    assert not accepts(compiled, "maybe")
    assert not accepts(compiled, "yesno")


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "object"}, '{"a": [1, {"b": null}]}', "[1]"),
        (PERSON, '{"name": "A\\n", "age": 3}', '{"name": "A", "age": 3.5}'),
        (PERSON, '{"name": "A", "age": 3}', '{"name": "A", "age": 3, "more": 1}'),
        ({"type": "string", "minLength": 2}, '"ab"', '"a"'),
        ({"type": "string", "minLength": 1, "maxLength": 3}, '"ab"', '"a\x01"'),
        ({"type": "string", "enum": ["a", 3]}, '"a"', "3"),
        ({"type": "integer", "minimum": 10, "exclusiveMaximum": 20}, "19", "20"),
        (True, '{"x": [true]}', "nul"),
        (
            {
                "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "type": "object"}},
                "$ref": "#/$defs/n",
            },
            '{"n": {"n": {}}}',
            '{"n": 1}',
        ),
    ],
)
def test_schemas(backend, accepts, schema, good, bad):
    compiled = backend.compile(grammars.json_schema(schema))
    assert accepts(compiled, good)
    assert not accepts(compiled, bad)


def test_special_tokens_are_no_text(backend, vocabulary):
    from tests.executor.grammar.conftest import allowed

    matcher = backend.compile(grammars.regex(".*")).matcher()
    assert matcher.accept(vocabulary.encode("a")[0])
    special = vocabulary.special - {*vocabulary.ends}
    assert special
    assert not special & {*allowed(matcher, vocabulary)}


@pytest.mark.parametrize(
    "form",
    [
        {
            "structures": [
                {"begin": "<f=x>", "schema": PERSON, "end": "</f>"},
                {"begin": "<f=y>", "schema": {"type": "integer"}, "end": "</f>"},
            ],
            "triggers": ["<f="],
        },
        {
            "format": {
                "type": "triggered_tags",
                "triggers": ["<f="],
                "tags": [
                    {
                        "type": "tag",
                        "begin": f"<f={name}>",
                        "content": {"type": "json_schema", "json_schema": schema},
                        "end": "</f>",
                    }
                    for name, schema in (("x", PERSON), ("y", {"type": "integer"}))
                ],
            }
        },
    ],
    ids=["structures", "format"],
)
def test_structural_tags_oblige_what_follows_a_trigger(backend, accepts, form):
    compiled = backend.compile(grammars.structural_tag(form))
    assert accepts(compiled, "just text < with brackets")
    assert accepts(compiled, 'so: <f=x>{"name": "a", "age": 3}</f> and <f=y>7</f> done')
    assert not accepts(compiled, "so: <f=z>7</f>")
    assert not accepts(compiled, 'so: <f=x>{"name": "a"}</f>')


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (
            {
                "type": "sequence",
                "elements": [
                    {"type": "const_string", "value": "id="},
                    {"type": "regex", "pattern": "[0-9]{2}"},
                    {"type": "any_text"},
                ],
            },
            "id=12 and more",
            "id=x",
        ),
        (
            {
                "type": "or",
                "elements": [
                    {"type": "const_string", "value": "no"},
                    {"type": "json_schema", "json_schema": {"type": "boolean"}},
                ],
            },
            "true",
            "yes",
        ),
        (
            {
                "type": "tags_with_separator",
                "separator": ";",
                "at_least_one": True,
                "tags": [
                    {"begin": "<", "content": {"type": "regex", "pattern": "a+"}, "end": ">"}
                ],
            },
            "<a>;<aa>",
            "<a>;",
        ),
        (
            {
                "type": "sequence",
                "elements": [
                    {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
                    {"type": "json_schema", "json_schema": {"type": "integer"}},
                ],
            },
            "<t>free < text</t>5",
            "<t>free</t>x",
        ),
        ({"type": "repeat", "min": 2, "max": 3, "content": {"type": "const_string", "value": "ab"}},
         "abab", "ab"),
    ],
)  # fmt: skip
def test_formats(backend, accepts, form, good, bad):
    compiled = backend.compile(grammars.structural_tag({"format": form}))
    assert accepts(compiled, good)
    assert not accepts(compiled, bad)


def test_a_special_token_may_be_a_tags_mark(backend, vocabulary):
    tag = {"begin": "<|im_start|>", "schema": {"type": "integer"}, "end": ""}
    compiled = backend.compile(
        grammars.structural_tag({"structures": [tag], "triggers": ["<|im_start|>"]})
    )
    matcher = compiled.matcher()
    special = vocabulary.special_named("<|im_start|>")
    assert special is not None
    assert matcher.accept(special)
    assert not matcher.accept(vocabulary.encode("x")[0])
    assert matcher.accept(vocabulary.encode("7")[0])


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        (grammars.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (grammars.json_schema({"not": {"type": "object"}}), "not"),
        (grammars.json_schema({"if": {"type": "string"}, "then": {"minLength": 1}}), "if"),
        (grammars.json_schema({"type": "strin"}), "strin"),
        (grammars.json_schema({"$ref": "http://elsewhere/x"}), "elsewhere"),
        (grammars.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "ref"),
        (grammars.json_schema({"$ref": "#/$defs/none"}), "#/$defs/none"),
        (grammars.json_schema(False), ""),
        (grammars.json_schema({"type": "string", "pattern": "(?=x)"}), "(?="),
        (grammars.regex("("), ""),
        (grammars.regex("a(?=b)"), ""),
        (grammars.regex(r"\bfoo"), ""),
        (grammars.ebnf("root ::= ("), ""),
        (grammars.ebnf("root ::= missing"), "missing"),
        (grammars.ebnf("nonsense"), ""),
        (grammars.structural_tag({"format": {"type": "nonsense"}}), "nonsense"),
        (grammars.structural_tag({"format": {"type": "tag"}}), ""),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(backend, grammar, named):
    with pytest.raises(InvalidRequest) as caught:
        FirstThatCan({backend.name: lambda: backend}).compile(grammar)
    assert named in caught.value.message
    assert grammar.kind in caught.value.message


def test_what_the_first_cannot_the_second_may(vocabulary, accepts):
    schema = {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}
    fast_first = make_backend(GrammarConfig(), vocabulary)
    compiled = fast_first.compile(grammars.json_schema(schema))
    assert accepts(compiled, "4")
    assert not accepts(compiled, "6")


@pytest.mark.parametrize("name", ["xgrammar", "llguidance"])
def test_whitespace_can_be_one_line(vocabulary, accepts, name):
    config = GrammarConfig(grammar_backend=name, constrained_json_disable_any_whitespace=True)
    compiled = make_backend(config, vocabulary).compile(grammars.json_schema(PERSON))
    assert accepts(compiled, '{"name": "a", "age": 3}')
    assert not accepts(compiled, '{"name": "a",\n"age": 3}')
    assert not accepts(compiled, '{ "name": "a", "age": 3}')


@pytest.mark.parametrize("name", ["xgrammar", "llguidance"])
def test_whitespace_can_be_one_line_in_structural_tags_too(vocabulary, accepts, name):
    config = GrammarConfig(grammar_backend=name, constrained_json_disable_any_whitespace=True)
    tag = {"begin": "<f>", "schema": PERSON, "end": "</f>"}
    grammar = grammars.structural_tag({"structures": [tag], "triggers": ["<f>"]})
    compiled = make_backend(config, vocabulary).compile(grammar)
    assert accepts(compiled, '<f>{"name": "a", "age": 3}</f>')
    assert not accepts(compiled, '<f>{"name": "a",\n"age": 3}</f>')


@pytest.mark.parametrize("pattern", ["a^b", "a$b", "(?=a)b", r"a\bc"])
def test_anchors_are_refused_in_structural_tags_too(vocabulary, pattern):
    form = {"type": "sequence", "elements": [{"type": "regex", "pattern": pattern}]}
    for name in ("xgrammar", "llguidance"):
        backend = make_backend(GrammarConfig(grammar_backend=name), vocabulary)
        for grammar in (grammars.structural_tag({"format": form}), grammars.regex(pattern)):
            with pytest.raises(InvalidRequest, match="cannot be enforced"):
                backend.compile(grammar)


@pytest.mark.parametrize("name", ["xgrammar", "llguidance"])
def test_whitespace_can_be_a_pattern(vocabulary, accepts, name):
    config = GrammarConfig(grammar_backend=name, constrained_json_whitespace_pattern="[ ]{0,2}")
    compiled = make_backend(config, vocabulary).compile(grammars.json_schema(PERSON))
    assert accepts(compiled, '{  "name":"a", "age":  3 }')
    assert not accepts(compiled, '{   "name":"a", "age": 3}')
    assert not accepts(compiled, '{\n"name":"a", "age": 3}')


def test_what_can_only_be_followed_for_ever_fails_at_once(backend, vocabulary):
    try:
        matcher = backend.compile(grammars.ebnf("root ::= root")).matcher()
    except InvalidRequest:
        return
    with pytest.raises(GrammarFailed):
        allowed(matcher, vocabulary)


def test_a_grammar_that_is_too_complex_to_follow_says_so(vocabulary):
    backend = LLGuidanceBackend(vocabulary)
    matcher = backend.compile(grammars.ebnf('root ::= "ab"{100000}')).matcher()
    [only] = allowed(matcher, vocabulary)
    with pytest.raises(GrammarFailed, match="Too many items"):
        matcher.accept(only)


def test_tokens_are_taken_back(backend, vocabulary):
    matcher = backend.compile(grammars.regex("ab[cd]*")).matcher()
    first = allowed(matcher, vocabulary)
    for token_id in vocabulary.encode("abcd"):
        assert matcher.accept(token_id)
    assert EOS in allowed(matcher, vocabulary)
    matcher.rollback(4)
    assert allowed(matcher, vocabulary) == first == vocabulary.encode("a")


def test_a_matcher_does_not_disturb_another(backend, accepts, vocabulary):
    compiled = backend.compile(grammars.regex("ab"))
    first = compiled.matcher()
    assert first.accept(vocabulary.encode("a")[0])
    assert accepts(compiled, "ab")
    assert first.accept(vocabulary.encode("b")[0])


def test_a_server_without_a_choice_takes_bounded_repeats_in_milliseconds(vocabulary):
    """Review 2, number 6: xgrammar walks through the vocabulary for a second, and is imported for
    another three; nothing of it may be needed."""
    script = (
        "import sys, pathlib\n"
        "from sapwood.executor.grammar.backends import make_backend\n"
        "from sapwood.executor.grammar.vocabulary import vocabulary_of\n"
        "from sapwood.schema import grammar as grammars\n"
        "from sapwood.schema.config.grammar import GrammarConfig\n"
        "from sapwood.text.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.from_directory(pathlib.Path(sys.argv[1]))\n"
        "vocabulary = vocabulary_of(tokenizer, size=int(sys.argv[2]), ends=[int(sys.argv[3])])\n"
        "backend = make_backend(GrammarConfig(), vocabulary)\n"
        "backend.compile(grammars.regex('[a-zA-Z ,.]{10,200}'))\n"
        "backend.compile(grammars.json_schema({'type': 'string', 'maxLength': 500}))\n"
        "assert not {'xgrammar', 'torch'} & sys.modules.keys(), 'imported'\n"
    )
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        subprocess.run(
            [sys.executable, "-c", script, folder, str(VOCAB), str(EOS)], check=True, timeout=60
        )
