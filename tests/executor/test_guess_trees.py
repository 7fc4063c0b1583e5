from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sapwood.executor.guess_trees import GuessTree
from sapwood.schema.draft_tree import ROOT
from sapwood.schema.step import GuessedTokens


def grown(breadth: int, *levels: Sequence[Sequence[tuple[int, float]]]) -> GuessTree:
    tree = GuessTree(breadth)
    for level in levels:
        tree.grow(level)
    return tree


def test_the_likeliest_guesses_get_children_and_stay() -> None:
    tree = grown(2, [[(1, 0.5), (2, 0.4)]], [[(3, 0.2), (4, 0.1)], [(5, 0.9), (6, 0.05)]])
    assert [tree.way_to(node) for node in tree.frontier] == [[1, 3], [2, 5]]
    assert tree.best(4) == GuessedTokens([1, 3, 2, 5], [ROOT, 0, ROOT, 2])
    # 6 is likelier than no other guess.
    assert tree.best(5) == GuessedTokens([1, 3, 4, 2, 5], [ROOT, 0, 0, ROOT, 3])


def test_the_first_guesses_stay_although_others_are_likelier() -> None:
    tree = grown(2, [[(1, 0.5), (2, 0.4)]], [[(3, 0.1), (4, 0.1)], [(5, 0.5), (6, 0.5)]])
    assert tree.best(2) == GuessedTokens([1, 3])
    assert tree.best(1) == GuessedTokens([1])
    assert [tree.way_to(node) for node in tree.frontier] == [[1, 3], [2, 5]]


def test_nothing_follows_an_end() -> None:
    tree = grown(2, [[(1, 0.9), (2, 0.1)]], [[], [(3, 1.0)]])
    assert [tree.way_to(node) for node in tree.frontier] == [[2, 3]]
    tree.grow([[]])
    assert tree.frontier == []
    assert grown(3, [[]]).best(5) == GuessedTokens([])


LEVEL = st.lists(st.floats(0.0, 1.1), min_size=0, max_size=4)


@given(st.integers(1, 4), st.integers(1, 12), st.lists(st.lists(LEVEL, min_size=4, max_size=4)))
def test_every_guess_comes_after_the_one_that_it_follows(
    breadth: int, most: int, levels: list[list[list[float]]]
) -> None:
    tree = GuessTree(breadth)
    for level in levels:
        chances = [sorted(found, reverse=True) for found in level[: len(tree.frontier)]]
        tree.grow([list(enumerate(found)) for found in chances])
    found = tree.best(most)
    parents = found.parents or list(range(ROOT, len(found.token_ids) - 1))
    assert len(found.token_ids) <= most
    assert all(ROOT <= parent < node for node, parent in enumerate(parents))
    assert len(set(zip(parents, found.token_ids, strict=True))) == len(parents), "no guess twice"
    # The first guesses come first.
    first = 0
    while first < len(parents) and found.token_ids[first] == 0 and parents[first] == first - 1:
        first += 1
    assert first == min(most, _num_levels(levels))


def _num_levels(levels: list[list[list[float]]]) -> int:
    """How long the chain of first guesses is."""
    count = 0
    for level in levels:
        if not level[0]:
            break
        count += 1
    return count
