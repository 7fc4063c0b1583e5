"""Both backends give a GBNF grammar the same language: all strings that Python's re matches."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from sapwood.executor.grammar.gbnf import NotGbnf, to_lark
from sapwood.executor.grammar.llguidance_backend import LLGuidanceBackend
from sapwood.schema import grammar as grammars
from tests.executor.grammar.schemas import random_ebnf

GREEDY = [
    ('root ::= a "b"\na ::= [a-z]+', "[a-z]+b"),
    ('root ::= ("ab" | "a") "bc"?', "(ab|a)(bc)?"),
    ('root ::= a* a "c"\na ::= "a" | "b"', "[ab]*[ab]c"),
    ('root ::= ("a"*)* "b"', "a*b"),
    ('root ::= (("a"? "b"){2})* | "c"+', "((a?b){2})*|c+"),
    ("root ::= [ab]{1,2} [ab]{1,2}", "[ab]{2,4}"),
    ('root ::= [^b]+ "c"', "[^b]+c"),
    ('root ::= [^c] "a"{2}', "[^c]aa"),
    ('root ::= "a"{2,} | "" | word word\nword ::= "b" | "c" word', "a{2,}||c*bc*b"),
]


@pytest.mark.parametrize(("text", "meaning"), GREEDY)
def test_every_short_string(backend, accepts, text, meaning):
    compiled = backend.compile(grammars.ebnf(text))
    for length in range(5):
        for letters in itertools.product("abc", repeat=length):
            string = "".join(letters)
            assert accepts(compiled, string) is bool(re.fullmatch(meaning, string)), string


def test_every_short_string_of_random_grammars(backend, accepts):
    for seed in range(40):
        text, meaning = random_ebnf(random.Random(seed))
        compiled = backend.compile(grammars.ebnf(text))
        for length in range(4):
            for parts in itertools.product(["ab", "1", "é "], repeat=length):
                string = "".join(parts)
                expected = bool(re.fullmatch(meaning, string))
                assert accepts(compiled, string) is expected, (text, string)


@pytest.mark.parametrize(
    ("text", "string"),
    [
        (r'root ::= "\x41\u00e9\U0001F600\n\"\\" [\]\-x]', 'Aé\U0001f600\n"\\-'),
        ("root ::= [^\\n-] [a-]", "a-"),
        ('# first\nroot ::= # more\n  "a" | # either\n  b\n\nb ::= "b"\n', "b"),
        ('root ::= (\n "a"\n | "b" )', "b"),
        ('root ::= expr\nexpr ::= expr "+" [0-9] | [0-9]', "1+2+3"),
        ('root ::= r-1_x\nr-1_x ::= "y"', "y"),
    ],
)
def test_how_it_is_written(backend, accepts, text, string):
    compiled = backend.compile(grammars.ebnf(text))
    assert accepts(compiled, string)
    assert not accepts(compiled, string + "!")


def test_llama_cpps_dot_is_any_character(vocabulary, accepts):
    compiled = LLGuidanceBackend(vocabulary).compile(grammars.ebnf('root ::= . "a" .'))
    assert accepts(compiled, "éa\n")
    assert not accepts(compiled, "aa")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "line 1: expected ::=, not 'the end'"),
        ("root ::= missing", "line 1: the rule 'missing' is not defined"),
        ('a ::= "b"', "there is no rule 'root'"),
        ('root ::= "a"\nroot ::= "b"', "line 2: the rule 'root' is defined twice"),
        ('root ::= ("a"', r"line 1: expected '\)', not 'the end'"),
        ('root ::= "a")', r"line 1: expected the name of a rule, not '\)'"),
        ('root ::= ("a" root ::= "b"', r"expected '\)', not 'root'"),
        ("root ::= *", r"'\*' cannot stand here"),
        ('root ::= "a', "line 1: '\"a' is no part of GBNF"),
        ("root ::= [b-a]", "a range ends before it begins"),
        ("root ::= [^]", "a set without characters"),
        (r'root ::= "\q"', r"unknown escape \\q"),
        (r'root ::= "\ud800"', r"\\ud800 is no character"),
        ('root ::= "a" (= "b")', "is no part of GBNF"),
        ("root ::= " + "(" * 101, "groups are nested more than 100 deep"),
    ],
)
def test_what_is_no_gbnf_is_named(text, message):
    with pytest.raises(NotGbnf, match=message):
        to_lark(text)
