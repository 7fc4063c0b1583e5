"""What a draft copies from the text, against a search written plainly."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.speculative.ngram import MOST_MATCHES, NgramDraft, NgramDrafter


def draft(text: Sequence[int], *, least: int = 1, most: int = 4) -> NgramDraft:
    return NgramDraft(text, least_match=least, most_match=most)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9]),
        ([1, 2, 3], []),
        ([], []),
        ([7], []),
        ([5, 1, 8, 6, 1, 9, 5, 1], [8, 6, 1]),  # two tokens match better than the later one
        ([5, 1, 8, 0, 5, 1, 9, 0, 5, 1], [9, 0, 5]),  # of equal matches the later one
        ([4, 4, 4], [4, 4, 4]),  # the text repeats itself
        ([1, 2, 1, 2, 1], [2, 1, 2]),
    ],
)
def test_it_copies_what_followed_the_longest_match(text: list[int], expected: list[int]) -> None:
    assert draft(text).propose(3) == expected


def test_short_matches_do_not_count() -> None:
    assert draft([1, 5, 2, 6, 2], least=2).propose(2) == []
    assert draft([1, 2, 5, 0, 1, 2], least=2).propose(2) == [5, 0]


def test_only_the_latest_matches_are_looked_at() -> None:
    """The longest match, of two tokens, lies before them."""
    text = [1, 2, 9, *[2, 7] * MOST_MATCHES, 1, 2]
    assert draft(text).propose(1) == [7]
    assert draft([1, 2, 9, *[2, 7] * (MOST_MATCHES - 1), 1, 2]).propose(1) == [9]


def test_no_more_is_proposed_than_asked() -> None:
    known = draft([1, 2, 3, 4, 1])
    assert known.propose(0) == []
    assert known.propose(1) == [2]


def plainly(text: Sequence[int], least: int, most: int, wanted: int) -> list[int]:
    """The same, place by place."""
    best, follows = 0, None
    for at in range(1, len(text)):
        length = 0
        while length < min(most, at) and text[at - 1 - length] == text[-1 - length]:
            length += 1
        if length >= max(best, 1):
            best, follows = length, at
    if follows is None or best < least:
        return []
    period = len(text) - follows
    return [text[follows + offset % period] for offset in range(wanted)]


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=4),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(1, 9),
)
def test_it_is_the_plain_search(
    prompt: list[int], outputs: list[list[int]], least: int, more: int, wanted: int
) -> None:
    known = NgramDrafter(least_match=least, most_match=least + more).begin(prompt)
    text = list(prompt)
    for output in outputs:
        known.extend(output)
        text += output
    assert known.propose(wanted) == plainly(text, least, least + more, wanted)
