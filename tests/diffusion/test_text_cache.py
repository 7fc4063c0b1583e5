from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from sapwood.diffusion.text_cache import TextCache


@dataclass
class Vectors:
    num_bytes: int


def test_the_least_recently_used_vectors_make_room() -> None:
    cache: TextCache[str, Vectors] = TextCache(10)
    cache.put("a", Vectors(5))
    cache.put("b", Vectors(5))
    assert cache.get("a") is not None
    cache.put("c", Vectors(5))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert (cache.num_hits, cache.num_misses) == (2, 1)


def test_vectors_larger_than_the_cache_push_nothing_out() -> None:
    cache: TextCache[str, Vectors] = TextCache(10)
    cache.put("a", Vectors(5))
    cache.put("large", Vectors(11))
    assert cache.get("large") is None
    assert cache.get("a") is not None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=60))
def test_the_bytes_are_those_of_what_is_kept(puts: list[tuple[int, int]]) -> None:
    cache: TextCache[int, Vectors] = TextCache(20)
    for name, num_bytes in puts:
        cache.put(name, Vectors(num_bytes))
        kept = [found.num_bytes for each in range(6) if (found := cache.get(each)) is not None]
        assert sum(kept) == cache.num_bytes <= 20
