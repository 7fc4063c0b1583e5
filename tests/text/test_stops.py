"""Stop strings over text that arrives in parts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.text.stops import StopMatcher, StopResult


def first_match(text: str, stop: list[str]) -> tuple[int, str] | None:
    """Where the first match ends and which it is, by looking at every end in turn."""
    for end in range(1, len(text) + 1):
        matches = [each for each in stop if text[:end].endswith(each)]
        if matches:
            return end, max(matches, key=len)
    return None


def feed(matcher: StopMatcher, parts: list[str]) -> tuple[str, str | None]:
    shown = ""
    for part in parts:
        result = matcher.push(part)
        shown += result.text
        if result.matched is not None:
            return shown, result.matched
    result = matcher.finish()
    return shown + result.text, result.matched


texts = st.text(alphabet="abé", max_size=40)
stop_lists = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=4)


@given(text=texts, stop=stop_lists, cuts=st.lists(st.integers(0, 40)), no_trim=st.booleans())
def test_any_split_gives_what_a_search_of_the_whole_gives(text, stop, cuts, no_trim):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(bounds)]
    shown, matched = feed(StopMatcher(stop, no_trim=no_trim), parts)
    expected = first_match(text, stop)
    if expected is None:
        assert (shown, matched) == (text, None)
    else:
        end, which = expected
        assert (shown, matched) == (text[: end if no_trim else end - len(which)], which)


@given(text=texts, stop=stop_lists)
def test_it_holds_back_no_more_than_could_begin_a_stop(text, stop):
    matcher = StopMatcher(stop)
    shown = ""
    for end, character in enumerate(text, start=1):
        result = matcher.push(character)
        shown += result.text
        if result.matched is not None:
            return
        held = text[len(shown) : end]
        could_begin = [
            text[start:end]
            for start in range(end)
            if any(each.startswith(text[start:end]) for each in stop)
        ]
        assert held == max(could_begin, key=len, default="")


def test_a_stop_over_three_pushes():
    matcher = StopMatcher(["</stop>"])
    assert matcher.push("answer</") == StopResult("answer")
    assert matcher.push("sto") == StopResult("")
    assert matcher.push("p> more") == StopResult("", "</stop>")


def test_what_began_like_a_stop_is_shown_when_it_is_none():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("one\n\n").text == "one"
    assert matcher.push("two").text == "\n\ntwo"
    assert matcher.push("\n").text == ""
    assert matcher.finish() == StopResult("\n")


def test_the_longest_of_those_that_end_together_wins():
    assert StopMatcher(["c", "bc", "abc"]).push("xabc") == StopResult("x", "abc")


def test_the_one_that_is_complete_first_wins_even_if_it_begins_later():
    assert StopMatcher(["abcd", "bc"]).push("abcd") == StopResult("a", "bc")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
