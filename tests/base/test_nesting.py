from __future__ import annotations

import pytest

from sapwood.base.nesting import is_deeper


@pytest.mark.parametrize(
    ("value", "depth"),
    [(3, 0), ("[[", 0), ([], 1), ({}, 1), ([1, {"a": []}, "x"], 3), ({"a": {"b": 1}, "c": [2]}, 2)],
)
def test_levels_are_counted_exactly(value, depth):
    assert not is_deeper(value, depth)
    assert depth == 0 or is_deeper(value, depth - 1)


def test_no_depth_is_too_deep():
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert is_deeper(value, 99_999)
    assert not is_deeper(value, 100_001)
