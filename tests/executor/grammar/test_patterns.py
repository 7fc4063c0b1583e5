from __future__ import annotations

import pytest

from sapwood.executor.grammar.patterns import why_not_plain


@pytest.mark.parametrize(
    "pattern",
    ["^[A-Z]{2}$", "a|b", "^(a|b)c?$", r"\d+\.\d*", "[^x]", "[]a]", r"^a\$$", "(?:ab)+", "é", ""],
)
def test_plain(pattern):
    assert why_not_plain(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("(?=a)", "(?="),
        ("(?i)a", "(?i"),
        (r"\bfoo", r"\b"),
        (r"(a)\1", r"\1"),
        (r"\p{L}", r"\p"),
        (r"a\\b", "\\\\"),
        ("a^b", "'^'"),
        ("a$b", "'$'"),
        ('say "x"', "'\"'"),
        ('["]', "class"),
        (r"[\n]", r"\n"),
        ("^a|b$", "anchor"),
        ("[abc", "not closed"),
        ("a\tb", "\\t"),
    ],
)
def test_not_plain(pattern, named):
    assert named in (why_not_plain(pattern) or "")
