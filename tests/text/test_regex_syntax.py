"""Regular expressions as trees, against what Python's own parser makes of them."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.text.regex_syntax import (
    EMPTY,
    MAX_NESTING,
    Character,
    Choice,
    RegexError,
    Repeat,
    Sequence,
    UnsupportedRegex,
    parse,
    walked,
)

PIECES = [
    *("a", "B", "é", " ", "\n", "1", "_", "-", "#", ",", "|", "(", ")", "[", "]", "{", "}", "."),
    *("*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "{0}", "{,}", "{2,1}", "*?", "+?"),
    *("(?:", "(?i:", "(?s:", "(?a:", "(?-i:", "(?i-s:", "(?P<n>", "(?i)", "(?x)", "(?u)", "(?L)"),
    *("(?#c)", "(?", "(?P", "^", "$", "[ab]", "[^a]", "[a-c]", "[c-a]", "[]a]", "[a-]", "[--a]"),
    *(r"\d", r"\W", r"\s", r"\b", r"\B", r"\A", r"\Z", r"\n", r"\.", r"\q", "\\", r"[\w-]"),
    *(r"\x61", r"\x6", r"\u0062", r"\U00000063", r"\U99999999", r"\N{DIGIT ONE}", r"\N{no}"),
    *(r"[\b]", r"[\B]", r"\0", r"\07", r"\101", r"\777", r"[\1]", r"[\8]", r"[\d-z]"),
]


@settings(max_examples=2000)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_what_is_a_regular_expression_is_what_python_says(pattern):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            re.compile(pattern)
            is_one = True
        except (re.error, OverflowError):
            is_one = False
    try:
        parse(pattern)
    except UnsupportedRegex:
        return
    except RegexError:
        assert not is_one
    else:
        assert is_one


@pytest.mark.parametrize(
    ("pattern", "character", "accepts"),
    [
        (".", "\n", False),
        ("(?s:.)", "\n", True),
        (r"\w", "é", True),
        (r"(?a)\w", "é", False),
        (r"(?a:\W)", "é", True),
        ("(?i)é", "É", True),
        ("(?i)[^a]", "A", False),
        ("(?i:(?-i:a))", "A", False),
        (r"[\d-]", "-", True),
        (r"[^\d\n]", "x", True),
        (r"\N{LATIN SMALL LETTER A}", "a", True),
        (r"\101", "A", True),
        ("(?x) a # comment", "a", True),
        ("(?x) # comment\n (?i) a", "A", True),
    ],
)
def test_characters(pattern, character, accepts):
    tree = parse(pattern)
    assert isinstance(tree, Character)
    assert tree.accepts(character) is accepts


@pytest.mark.parametrize(
    ("pattern", "construct"),
    [
        ("(?=a)", "look-around"),
        ("(?<!a)b", "look-around"),
        (r"(a)\1", "a back-reference"),
        ("(?P<n>a)(?P=n)", "a back-reference"),
        ("(a)(?(1)b)", "a conditional group"),
        ("(?>a)", "an atomic group"),
        ("a*+", "a possessive repeat"),
    ],
)
def test_what_has_no_tree_is_named(pattern, construct):
    with pytest.raises(UnsupportedRegex, match=construct):
        parse(pattern)


def test_a_tree_is_as_small_as_its_pattern():
    tree = parse("(a|){3}(){1000}(b{0}){1000}|()|()")
    assert isinstance(tree, Choice)
    repeat, empty = tree.ways
    assert isinstance(repeat, Repeat)
    assert (repeat.least, repeat.most) == (3, 3)
    assert empty is EMPTY
    assert parse("(?:)(a{0})") is EMPTY
    letters = parse("(?i)" + "a" * 1000 + "[x-z]" * 100)
    assert isinstance(letters, Sequence)
    assert len({one.accepts for one in walked(letters) if isinstance(one, Character)}) == 2


def test_groups_are_nested_so_deep_and_no_deeper():
    parse("(" * MAX_NESTING + "a" + ")" * MAX_NESTING)
    with pytest.raises(RegexError, match="nested too deeply"):
        parse("(" * (MAX_NESTING + 1) + "a" + ")" * (MAX_NESTING + 1))
