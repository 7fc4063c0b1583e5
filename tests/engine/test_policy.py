from __future__ import annotations

import random

import pytest

from sapwood.engine.policy import SCHEDULE_POLICIES, Waiting


def order(name: str, waiting: list[Waiting], seed: int = 0) -> list[int]:
    return [one.index for one in SCHEDULE_POLICIES.get(name).order(waiting, random.Random(seed))]


def waiting(index: int, **facts: object) -> Waiting:
    known = {"priority": 0, "arrival": index, "max_new_tokens": 10, **facts}
    return Waiting(index=index, **known)


def test_first_come_first_served() -> None:
    assert order("fcfs", [waiting(0, arrival=5), waiting(1, arrival=2)]) == [1, 0]


def test_longest_prefix_first() -> None:
    some = [waiting(0, path=[(1, 4)]), waiting(1, path=[(1, 16), (2, 8)]), waiting(2)]
    assert order("lpm", some) == [1, 0, 2]


def test_longest_output_first() -> None:
    some = [waiting(0), waiting(1, max_new_tokens=50), waiting(2)]
    assert order("lof", some) == [1, 0, 2]


def test_depth_first_takes_the_heaviest_subtree_and_keeps_it_together() -> None:
    light, heavy, deep = [(1, 4)], [(2, 4)], [(2, 4), (3, 4)]
    some = [
        waiting(0, path=light),
        waiting(1, path=heavy),
        waiting(2, path=deep),
        waiting(3, path=light),
        waiting(4, path=deep),
    ]
    assert order("dfs-weight", some) == [1, 2, 4, 0, 3]


def test_random_depends_on_the_seed_alone() -> None:
    some = [waiting(index) for index in range(20)]
    assert order("random", some, seed=1) == order("random", some, seed=1)
    assert order("random", some, seed=1) != order("random", some, seed=2)
    assert sorted(order("random", some)) == list(range(20))


@pytest.mark.parametrize("name", SCHEDULE_POLICIES.names())
def test_priority_comes_before_every_policy(name: str) -> None:
    some = [waiting(0, path=[(1, 64)], max_new_tokens=99), waiting(1, priority=1)]
    assert order(name, some) == [1, 0]
