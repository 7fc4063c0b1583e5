from __future__ import annotations

import random

import pytest

from sapwood.memory.pages import PageAllocator


@pytest.mark.parametrize("seed", range(20))
def test_every_page_has_exactly_one_owner(seed: int) -> None:
    rng = random.Random(seed)
    allocator = PageAllocator(64)
    held: list[list[int]] = []
    for _ in range(500):
        if held and rng.random() < 0.5:
            allocator.give_back(held.pop(rng.randrange(len(held))))
        else:
            held.append(allocator.take(rng.randint(0, min(8, allocator.num_free))))
        in_use = [page for pages in held for page in pages]
        assert len(in_use) == len(set(in_use)) == 64 - allocator.num_free


def test_the_page_given_back_last_is_taken_first() -> None:
    allocator = PageAllocator(8)
    pages = allocator.take(3)
    allocator.give_back([pages[1]])
    assert allocator.take(1) == [pages[1]]


def test_giving_a_page_back_twice_is_noticed() -> None:
    allocator = PageAllocator(4)
    pages = allocator.take(2)
    allocator.give_back(pages)
    with pytest.raises(AssertionError, match="given back twice"):
        allocator.give_back(pages[:1])


def test_a_pool_has_at_least_one_page() -> None:
    with pytest.raises(ValueError, match="num_pages must be >= 1"):
        PageAllocator(0)
