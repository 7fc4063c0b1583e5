"""What a draft copies from text, against a search written plainly."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.schema.draft_tree import ROOT, depths
from sapwood.speculative.interface import Guesses
from sapwood.speculative.ngram import (
    MOST_LOOKED_AT,
    SIBLING_LENGTH,
    NgramDrafter,
    NgramRules,
)

RULES = NgramRules()


def guesses(*texts: Sequence[int], most: int, rules: NgramRules = RULES) -> Guesses:
    """What follows the last text, after the others were other requests'."""
    drafter = NgramDrafter(rules, capacity=10_000)
    *others, last = texts
    for other in others:
        drafter.begin("", other).close()
    return drafter.begin("", last).propose(most)


def chain(*texts: Sequence[int], most: int, rules: NgramRules = RULES) -> list[int]:
    found = guesses(*texts, most=most, rules=rules)
    assert len(found.kinds) == len(found.token_ids)
    return list(found.token_ids)


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
    assert chain(text, most=3) == expected


def test_short_matches_do_not_count() -> None:
    rules = NgramRules(least_match=2)
    assert chain([1, 5, 2, 6, 2], most=2, rules=rules) == []
    assert chain([1, 2, 5, 0, 1, 2], most=2, rules=rules) == [5, 0]


def test_only_the_latest_places_are_looked_at() -> None:
    """The longest match, of four tokens, lies before them."""
    others = [3, 1, 2, 7] * MOST_LOOKED_AT
    assert chain([4, 3, 1, 2, 9, *others, 4, 3, 1, 2], most=1) == [7]
    assert chain([4, 3, 1, 2, 9, *others[4:], 4, 3, 1, 2], most=1) == [9]


def test_no_more_is_guessed_than_asked() -> None:
    assert chain([1, 2, 3, 4, 1], most=0) == []
    assert chain([1, 2, 3, 4, 1], most=1) == [2]
    rules = NgramRules(branch_length=2)
    assert chain([1, 2, 3, 4, 1], most=5, rules=rules) == [2, 3]


def test_other_requests_text_counts() -> None:
    assert chain([8, 1, 2, 3, 4], [9, 1, 2], most=3) == [3, 4]
    assert chain([8, 1, 2, 3], [8, 1, 2, 4], [1, 2], most=3) == [4]


def test_text_of_another_namespace_does_not() -> None:
    drafter = NgramDrafter(RULES, capacity=1000)
    drafter.begin("mine", [8, 1, 2, 3, 4])
    assert not drafter.begin("yours", [9, 1, 2]).propose(3).token_ids
    assert drafter.begin("mine", [9, 1, 2]).propose(3).token_ids == [3, 4]


def test_guesses_have_kinds_by_match_and_agreement() -> None:
    texts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 8, 7], [0, 1, 2, 3]]
    found = guesses(*texts, most=4)
    assert found.token_ids == [4, 9, 8, 7]
    agreed, disputed, alone, later = found.kinds
    assert len({agreed, disputed, alone, later}) == 4
    assert guesses(texts[1], texts[2], most=4).kinds[2] == alone
    assert guesses([2, 3, 4, 9, 8], [2, 3], most=4).kinds[1] != disputed


def test_the_most_frequent_comes_first_if_asked() -> None:
    texts = [[1, 2, 3, 5], [1, 2, 3, 5], [1, 2, 3, 6], [0, 1, 2, 3]]
    assert guesses(*texts, most=1, rules=NgramRules()).token_ids == [6]
    assert guesses(*texts, most=1, rules=NgramRules(by_frequency=True)).token_ids == [5]


TREES = NgramRules(least_breadth=1, most_breadth=4)


def ways(found: Guesses) -> set[tuple[int, ...]]:
    """All ways from the root to a leaf."""
    parents = list(found.parents) or list(range(ROOT, len(found.token_ids) - 1))
    to: dict[int, tuple[int, ...]] = {ROOT: ()}
    for node, (parent, token_id) in enumerate(zip(parents, found.token_ids, strict=True)):
        assert parent < node
        to[node] = (*to[parent], token_id)
    assert len(set(to.values())) == len(to), "no two siblings are the same token"
    return {way for node, way in to.items() if node not in parents}


def test_a_tree_has_what_followed_several_places() -> None:
    texts = [[0, 1, 2, 3, 5, 7, 8], [0, 1, 2, 3, 6, 7, 9], [4, 1, 2, 3, 7], [0, 1, 2, 3]]
    found = guesses(*texts, most=8, rules=TREES)
    assert ways(found) == {(6, 7, 9), (5, 7, 8), (7,)}
    assert list(found.token_ids[:3]) == [6, 7, 9], "the latest of the longest matches comes first"
    assert len({found.kinds[node] for node, at in enumerate(found.parents) if at == ROOT}) == 3
    assert guesses(*texts, most=8).token_ids == [6, 7, 9], "a chain is the tree's first way"


def test_a_way_may_part_later() -> None:
    texts = [[1, 2, 3, 5, 7, 8], [1, 2, 3, 5, 6], [1, 2, 3, 5, 7, 9], [0, 1, 2, 3]]
    assert ways(guesses(*texts, most=8, rules=TREES)) == {(5, 7, 9), (5, 7, 8), (5, 6)}
    assert ways(guesses(*texts, most=2, rules=TREES)) == {(5, 7), (5, 6)}


def test_long_matches_have_fewer_branches() -> None:
    rules = NgramRules(least_match=2, most_match=12, least_breadth=2, most_breadth=7)
    assert [rules.breadth(match) for match in (1, 2, 4, 7, 11, 12, 30)] == [7, 7, 6, 4, 2, 2, 2]
    assert NgramRules().breadth(1) == 1
    narrow = NgramRules(least_match=1, most_match=3, most_breadth=2)
    texts = [[1, 2, 3, 5], [1, 2, 3, 6], [1, 2, 3, 7], [1, 2, 3]]
    assert ways(guesses(*texts, most=4, rules=narrow)) == {(7,)}
    wide = NgramRules(least_match=1, most_match=3, least_breadth=2, most_breadth=2)
    assert ways(guesses(*texts, most=4, rules=wide)) == {(7,), (6,)}


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=5))
def test_every_tree_begins_with_the_chain(texts: list[list[int]]) -> None:
    found = guesses(*texts, most=12, rules=TREES)
    tokens = list(found.token_ids)
    alone = chain(*texts, most=12)
    assert tokens[: len(alone)] == alone
    ways(found)
    if found.parents:
        assert list(found.parents[: len(alone)]) == list(range(ROOT, len(alone) - 1))
        assert max(depths(found.parents)) <= 12
        assert len(found.only(range(len(alone))).parents) == 0
        assert len(tokens) <= 12 + 9 * SIBLING_LENGTH


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
    st.lists(st.integers(0, 9), max_size=40),
    st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=4),
    st.integers(3, 5),
    st.integers(0, 4),
    st.integers(1, 9),
)
def test_it_is_the_plain_search(
    prompt: list[int], outputs: list[list[int]], least: int, more: int, wanted: int
) -> None:
    rules = NgramRules(least_match=least, most_match=least + more)
    known = NgramDrafter(rules, capacity=1000).begin("", prompt)
    text = list(prompt)
    for output in outputs:
        known.extend(output)
        text += output
    assert list(known.propose(wanted).token_ids) == plainly(text, least, least + more, wanted)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 3), max_size=12)), max_size=20
    )
)
def test_memory_is_bounded_and_counted(texts: list[tuple[str, list[int]]]) -> None:
    drafter = NgramDrafter(NgramRules(), capacity=20)
    drafts = []
    for namespace, token_ids in texts:
        drafts.append(drafter.begin(namespace, token_ids))
        drafts[-1].propose(4)
        assert drafter.num_tokens <= 20
        kept = [
            len(text.tokens)
            for index in drafter._indexes.values()
            for text in index._texts.values()
        ]
        assert sum(kept) == drafter.num_tokens
    for draft in drafts:
        draft.extend([1, 2])
        assert len(draft.propose(3).token_ids) <= 3
        assert drafter.num_tokens <= 20
    assert drafter.num_namespaces <= 3


def test_what_is_forgotten_leaves_nothing() -> None:
    drafter = NgramDrafter(NgramRules(), capacity=6)
    old = drafter.begin("a", [1, 2, 3, 4, 5, 6])
    new = drafter.begin("b", [1, 2, 3, 7, 8])
    assert drafter.num_namespaces == 1
    old.extend([9])
    assert not old.propose(3).token_ids
    assert drafter.num_tokens == 5
    new.extend([1])
    assert new.propose(3).token_ids == [2, 3, 7]
