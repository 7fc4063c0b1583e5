"""Branches of branches: each page's place says what begins in it."""

from __future__ import annotations

from sapwood.memory.namespace import MEDIUM, Branch, base_of, branches_of, end_from, place_at
from sapwood.memory.prefix_tree import token_key

PAGE = 4 * 4
"""Bytes of a page of four tokens in a key."""


def shown(base: str | Branch, first_token: int, digest: str) -> Branch:
    return Branch(base=base, first_token=first_token, name=MEDIUM + digest)


def test_two_pictures_that_begin_in_one_page_are_both_in_its_place() -> None:
    key = token_key(range(16))
    both = shown(shown("a", 5, "one"), 7, "two")
    place = place_at(both, key, PAGE, PAGE)
    assert place == b"5:medium one\x007:medium two\0" + key[PAGE : 2 * PAGE]
    assert place != place_at(shown(shown("a", 5, "one"), 7, "three"), key, PAGE, PAGE)
    assert place != place_at(shown(shown("a", 5, "two"), 7, "one"), key, PAGE, PAGE)
    assert place_at(both, key, 0, PAGE) == key[:PAGE], "what comes before is shared"
    assert place_at(both, key, 2 * PAGE, PAGE) == key[2 * PAGE : 3 * PAGE]
    assert base_of(both) == "a"


def test_nodes_end_where_the_next_picture_begins() -> None:
    key = token_key(range(16))
    both = shown(shown("", 5, "one"), 12, "two")
    ends = [end_from(both, key, offset, PAGE) for offset in (0, PAGE, 2 * PAGE, 3 * PAGE)]
    assert ends == [PAGE, 3 * PAGE, 3 * PAGE, len(key)]


def test_marks_name_their_branches() -> None:
    mark = shown("", 5, "one").mark + Branch(base="", first_token=6, name="poet").mark
    assert branches_of(mark.decode()) == ["medium one", "poet"]
