from __future__ import annotations

import json
import random

import numpy as np
import pytest

from sapwood.executor.grammar.jump import (
    MAX_FORCED_TOKENS,
    forced_text,
    forced_tokens,
    tokens_of,
)
from sapwood.schema.grammar import Grammar
from tests.executor.grammar.conftest import EOS, allowed

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Anna", "Bo"]}, "ok": {"const": True}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
)
LAUGHS = "\n".join(f"{chr(97 + i)} ::= {chr(98 + i)} {chr(98 + i)}" for i in range(24))


def mask_of(matcher, vocabulary):
    mask = np.zeros((1, -(-vocabulary.size // 32)), dtype=np.int32)
    matcher.fill(mask, 0)
    return mask


def text_from(matcher, vocabulary) -> bytes:
    return forced_text(matcher, mask_of(matcher, vocabulary), vocabulary)


def feed(matcher, vocabulary, text: str) -> None:
    assert all(matcher.accept(token_id) for token_id in vocabulary.encode(text))


@pytest.mark.parametrize(
    ("before", "forced"),
    [("", b'{"'), ('{"name":"', b""), ('{"name":"B', b'o"'), ('{"name":"A', b"nn")],
)
def test_the_text_that_is_certain(backend, vocabulary, before, forced):
    matcher = backend.compile(Grammar(kind="json_schema", text=SCHEMA)).matcher()
    feed(matcher, vocabulary, before)
    found = text_from(matcher, vocabulary)
    assert found.startswith(forced) if before != "" and forced else found in (forced, b"{")
    # The matcher is where it was.
    assert text_from(matcher, vocabulary) == found


def test_every_continuation_begins_with_it(backend, vocabulary):
    """Walk at random; what was said to be certain is what came."""
    compiled = backend.compile(Grammar(kind="json_schema", text=SCHEMA))
    for seed in range(20):
        rng = random.Random(seed)
        matcher = compiled.matcher()
        said: list[tuple[int, bytes]] = []
        output = b""
        for _ in range(60):
            said.append((len(output), text_from(matcher, vocabulary)))
            token_id = rng.choice(allowed(matcher, vocabulary))
            assert matcher.accept(token_id)
            if token_id == EOS:
                break
            output += vocabulary.tokens[token_id]
        for place, certain in said:
            rest = output[place:]
            assert rest.startswith(certain) or certain.startswith(rest)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "ab" root',
        'root ::= "a"{2000000000}',
        'root ::= "a"{100000}',
        f'root ::= a a\n{LAUGHS}\ny ::= "xy"',
    ],
)
def test_text_without_an_end_is_cut(vocabulary, text):
    from sapwood.executor.grammar.xgrammar_backend import XGrammarBackend

    backend = XGrammarBackend(vocabulary)
    matcher = backend.compile(Grammar(kind="ebnf", text=text)).matcher()
    found = text_from(matcher, vocabulary)
    assert MAX_FORCED_TOKENS <= len(found) <= 2 * MAX_FORCED_TOKENS


def test_the_end_of_the_output_is_never_forced(backend, vocabulary):
    matcher = backend.compile(Grammar(kind="regex", text="abc")).matcher()
    assert text_from(matcher, vocabulary) == b"abc"
    feed(matcher, vocabulary, "abc")
    assert text_from(matcher, vocabulary) == b""
    assert not matcher.has_ended


def test_one_token_is_not_worth_it(backend, vocabulary):
    matcher = backend.compile(Grammar(kind="regex", text="a[bc]")).matcher()
    assert text_from(matcher, vocabulary) == b"a"
    assert forced_tokens(matcher, mask_of(matcher, vocabulary), vocabulary) == []


def test_forced_bytes_that_are_no_whole_characters(vocabulary):
    assert tokens_of("aé".encode()[:2] + b"", vocabulary) == []
    assert tokens_of("éé".encode(), vocabulary) == vocabulary.encode("éé")[:-1]
