"""A text that arrives in parts reads as if it were all there."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.text.events import CallArguments, CallEnd, Content, Markup, merged
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
    # What a malformed text was held up to depends on its parts: a caller goes back to its mark.
    rest = "" if result == ["malformed"] else source.slice(source.pos, 10**6)
    return result, merged(source.events), rest


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


@pytest.mark.timeout(60)
def test_passing_many_tags_costs_no_more_for_each_in_a_longer_text():
    """A search for the tag that is nowhere, or a copy of the rest, at each tag would take hours."""
    many = 1_000_000
    source = Source()
    source.add("<a>" * many)
    source.end()

    def steps():
        found = 0
        while (yield from source.passing(Content, ("<a>", "<b>"))) is not None:
            source.pos = source.tag_start + len("<a>")
            found += 1
        assert found == many

    assert not run(source, steps())
    assert source.events == []


@pytest.mark.timeout(60)
def test_many_neighbours_are_joined_at_once():
    [joined] = merged([Content("x" * 100)] * 300_000)
    assert len(joined.text) == 30_000_000


def test_only_neighbours_of_one_kind_are_joined():
    events = [Content("a"), Content("b"), Markup("c"), Markup("d"), Content("e")]
    events += [CallArguments(0, "f"), CallArguments(0, "g"), CallArguments(1, "h"), CallEnd(1, "")]
    assert merged(events) == [
        Content("ab"),
        Markup("cd"),
        Content("e"),
        CallArguments(0, "fg"),
        CallArguments(1, "h"),
        CallEnd(1, ""),
    ]
