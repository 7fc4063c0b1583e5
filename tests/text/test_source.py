"""A text that arrives in parts reads as if it were all there."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.text.events import Content, Markup, merged
from sapwood.text.source import Malformed, Source, first_of, held_from, run

WORD = re.compile(r"[a-z]+")


def read(parts, reader):
    """What the reader returns (or that it was malformed), the events, and what is unread."""
    source = Source()
    result = []

    def steps():
        try:
            result.append((yield from reader(source)))
        except Malformed:
            result.append("malformed")

    running = steps()
    for part in parts:
        source.add(part)
        run(source, running)
    source.end()
    run(source, running)
    return result, merged(source.events), source.slice(source.pos, 10**6)


READERS = {
    "until": lambda source: source.until("--", limit=6),
    "word": lambda source: source.while_matching(WORD, limit=5),
    "skips": lambda source: source.skips("a--b"),
    "after space": lambda source: source.skips_after_space("--", "ab"),
    "space": lambda source: source.space(),
    "passing": lambda source: source.passing(Content, ("--", "-a-")),
    "streaming": lambda source: source.streaming_until(
        ("-a-", "b--"), lambda text: source.emit(Markup(text))
    ),
    "peek": lambda source: source.peek(4),
}


@given(st.sampled_from(sorted(READERS)), st.text(alphabet="ab- \n", max_size=14), st.data())
def test_the_split_makes_no_difference(name, text, data):
    at = data.draw(st.integers(0, len(text)))
    whole = read([text], READERS[name])
    assert read([text[:at], text[at:]], READERS[name]) == whole
    assert read(list(text), READERS[name]) == whole


def test_what_is_too_long_is_malformed():
    assert read(["abcdefg--"], READERS["until"])[0] == ["malformed"]
    assert read(["abcdef--"], READERS["until"])[0] == ["abcdef"]
    assert read(["abcdef"], READERS["word"])[0] == ["malformed"]


def test_passing_leaves_white_space_before_the_tag():
    result, events, rest = read(["one \n --two"], READERS["passing"])
    assert (result, events, rest) == (["--"], [Content("one")], " \n --two")
    result, events, rest = read(["one \n"], READERS["passing"])
    assert (result, events, rest) == ([None], [Content("one \n")], "")


@pytest.mark.parametrize(
    ("text", "found", "held"),
    [
        ("x--", (1, "--"), 1),
        ("x-", None, 1),
        ("x-a", None, 1),
        ("xa", None, 2),
        ("-a--", (0, "-a-"), 2),
    ],
)
def test_tags(text, found, held):
    tags = ("--", "-a-")
    assert first_of(tags, text, 0) == found
    if found is None:
        assert held_from(tags, text, 0) == held
