"""The tree of prompts against a plain list of what was inserted."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.policies.text_tree import NODE_BYTES, TextTree

WORKERS = ("a", "b", "c")

# Few letters, so that many texts share beginnings.
texts = st.text("xy", max_size=12).map(str.encode)
inserts = st.lists(st.tuples(texts, st.sampled_from(WORKERS)), max_size=40)


def shared(one: bytes, other: bytes) -> int:
    same = (left == right for left, right in zip(one, other, strict=False))
    return sum(takewhile(bool, same))


@given(inserts=inserts, text=texts, allowed=st.sets(st.sampled_from(WORKERS)))
def test_the_longest_known_beginning_is_found(
    inserts: list[tuple[bytes, str]], text: bytes, allowed: set[str]
) -> None:
    tree = TextTree(1 << 20)
    for inserted, worker in inserts:
        tree.insert(inserted, worker)
    match = tree.match(text, allowed)
    longest = max((shared(text, one) for one, who in inserts if who in allowed), default=0)
    assert match.num_bytes == longest
    if longest:
        able = {who for one, who in inserts if shared(text, one) >= longest}
        assert match.worker in able & allowed
    else:
        assert match.worker is None


@given(inserts=inserts, max_bytes=st.integers(0, 8 * NODE_BYTES))
def test_the_tree_never_outgrows_its_limit(
    inserts: list[tuple[bytes, str]], max_bytes: int
) -> None:
    tree = TextTree(max_bytes)
    for inserted, worker in inserts:
        tree.insert(inserted, worker)
        assert tree.num_bytes <= max_bytes
        seen = [one for one, who in inserts if who == worker]
        match = tree.match(inserted, {worker})
        # What it says is true, if not all that is.
        assert match.num_bytes <= max(shared(inserted, one) for one in seen)


def test_what_was_used_least_recently_is_dropped() -> None:
    tree = TextTree(3 * (NODE_BYTES + 1))
    for text in (b"1", b"2", b"3", b"1", b"4"):
        tree.insert(text, "a")
    known = [text for text in (b"1", b"2", b"3", b"4") if tree.match(text, {"a"}).num_bytes]
    assert known == [b"1", b"3", b"4"]


def test_a_forgotten_worker_counts_again_for_what_it_sees_later() -> None:
    tree = TextTree(1 << 20)
    tree.insert(b"hello", "a")
    tree.forget("a")
    assert tree.match(b"hello", {"a"}).worker is None
    tree.insert(b"help", "a")
    assert tree.match(b"hello", {"a"}).num_bytes == 3


def test_the_latest_of_several_workers_is_found() -> None:
    tree = TextTree(1 << 20)
    tree.insert(b"hello", "a")
    tree.insert(b"hello", "b")
    assert tree.match(b"hello there", {"a", "b"}).worker == "b"
    tree.insert(b"hello", "a")
    assert tree.match(b"hello there", {"a", "b"}).worker == "a"
