"""Which requests share pages: against a search of everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from sapwood.kernels.shared_prefixes import SharedPrefix, find_shared_prefixes


def table_of(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], list[int]]:
    """The rows as a page table, and their lengths."""
    widest = max(len(row) for row in rows)
    padded = [[*row, *[0] * (widest - len(row))] for row in rows]
    return np.array(padded, dtype=np.int32), [len(row) for row in rows]


def groups_of(*rows: Sequence[int]) -> set[tuple[tuple[int, ...], int]]:
    return {(g.requests, g.num_pages) for g in find_shared_prefixes(*table_of(rows))}


def test_nothing_in_common() -> None:
    assert groups_of([1, 2], [3, 2], [4]) == set()
    assert groups_of([1, 2]) == set()


def test_two_groups_and_one_alone() -> None:
    rows = ([1, 2, 3], [9], [1, 2, 4], [5, 6], [5, 7])
    assert groups_of(*rows) == {((0, 2), 2), ((3, 4), 1)}


def test_padding_is_no_page() -> None:
    """Unused entries are all 0, and so are equal."""
    table, lens = table_of([[1, 2, 3], [1, 2, 3], [1]])
    table = np.pad(table, ((0, 0), (0, 5)))
    (group,) = find_shared_prefixes(table, lens)
    assert group == SharedPrefix(requests=(0, 1), num_pages=3)
    assert find_shared_prefixes(table, [0, 0, 0]) == []


def test_finer_groups_where_they_save_more() -> None:
    short, long = [1], [1, 2, 3, 4]
    assert groups_of(short, long, long) == {((1, 2), 4)}
    pairs = ([1, 2, 8], [1, 2, 8], [1, 2, 9], [1, 2, 9])
    assert groups_of(*pairs, [1, 2]) == {((0, 1, 2, 3, 4), 2)}
    assert groups_of([1, 8, 8], [1, 8, 8], [1, 9, 9], [1, 9, 9]) == {((0, 1), 3), ((2, 3), 3)}
    rows = [[1], [1, 5], [1], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert groups_of(*rows) == {((0, 1, 2), 1), ((3, 4), 4)}


def test_many_requests_each_a_page_longer() -> None:
    """The tree of their prefixes is as deep as there are requests."""
    rows = [list(range(1, 2 + i)) for i in range(600)]
    found = find_shared_prefixes(*table_of(rows))
    assert sum(group.num_saved_pages for group in found) > 299 * 301


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for index, group in enumerate(rest):
            yield [*rest[:index], [items[0], *group], *rest[index + 1 :]]


def saved(rows: Sequence[Sequence[int]], group: Sequence[int]) -> int:
    columns = zip(*(rows[member] for member in group), strict=False)
    depth = len(list(itertools.takewhile(lambda pages: len(set(pages)) == 1, columns)))
    return (len(group) - 1) * depth


@pytest.mark.parametrize("seed", range(60))
def test_no_other_grouping_saves_more(seed: int) -> None:
    choose = random.Random(seed)
    rows = [choose.choices([1, 2], [5, 1], k=choose.randint(1, 5)) for _ in range(6)]
    found = find_shared_prefixes(*table_of(rows))
    members = [member for group in found for member in group.requests]
    assert len(members) == len(set(members))
    for group in found:
        assert group.num_saved_pages == saved(rows, group.requests) > 0
    best = max(sum(saved(rows, g) for g in grouping) for grouping in partitions(list(range(6))))
    assert sum(group.num_saved_pages for group in found) == best
