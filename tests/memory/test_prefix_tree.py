"""The tree against a plain model: a set of known page-aligned prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.namespace import Branch, Namespace, base_of
from sapwood.memory.prefix_tree import Node, PrefixTree, token_key
from tests.memory.mirror import Mirror
from tests.tiers import examples

PAGE = 2


def make_tree(policy: str = "lru") -> PrefixTree:
    return PrefixTree(PAGE, EVICTION_POLICIES[policy])


def hit(tree: PrefixTree, tokens: list[int]) -> None:
    """A request that goes on from that prefix, and ends."""
    node = tree.match("", token_key(tokens)).node
    tree.lock(node)
    tree.count_hit(node)
    tree.unlock(node)


def matched_tokens(tree: PrefixTree, namespace: Namespace, tokens: list[int]) -> int:
    return PAGE * sum(count for _, count in tree.path(namespace, token_key(tokens)))


def keep(tree: PrefixTree, namespace: Namespace, tokens: list[int], pages: list[int]) -> Node:
    node, _ = tree.insert(namespace, token_key(tokens), pages)
    return node


def test_a_prefix_is_found_in_whole_pages() -> None:
    tree = make_tree()
    keep(tree, "", [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert matched_tokens(tree, "", [1, 2, 3, 4, 9, 9]) == 4
    assert matched_tokens(tree, "", [1, 2, 3]) == 2
    assert matched_tokens(tree, "", [9]) == 0
    assert tree.match("", token_key([1, 2, 3, 4])).pages == [10, 11]


def test_namespaces_do_not_share() -> None:
    tree = make_tree()
    keep(tree, "a", [1, 2], [1])
    assert matched_tokens(tree, "b", [1, 2]) == 0
    assert matched_tokens(tree, "a", [1, 2]) == 2


def test_a_branch_shares_what_comes_before_it_in_both_directions() -> None:
    tree = make_tree()
    branch = Branch(base="a", first_token=2, name="x")
    keep(tree, "a", [1, 2, 3, 4, 5, 6], [10, 11, 12])
    found = tree.match(branch, token_key([1, 2, 3, 4, 5, 6]))
    assert found.pages == [10], "the same tokens, but computed otherwise"
    _, pages = tree.insert(branch, token_key([1, 2, 3, 4, 5, 6]), [20, 21, 22])
    assert pages == [10, 21, 22]
    assert tree.match(branch, token_key([1, 2, 3, 4, 9, 9])).pages == [10, 21]
    assert tree.match("a", token_key([1, 2, 3, 4, 5, 6])).pages == [10, 11, 12]
    other = Branch(base="a", first_token=2, name="y")
    assert tree.match(other, token_key([1, 2, 3, 4])).pages == [10]
    later = Branch(base="a", first_token=4, name="x")
    assert tree.match(later, token_key([1, 2, 3, 4, 5, 6])).pages == [10, 11]
    first = Branch(base="b", first_token=2, name="x")
    keep(tree, first, [7, 8, 9, 9], [30, 31])
    assert tree.match("b", token_key([7, 8, 9, 9])).pages == [30]
    inside = Branch(base="a", first_token=3, name="x")
    assert tree.match(inside, token_key([1, 2, 3, 4])).pages == [10], "token 2 is another's there"
    tree.check()
    assert sorted(tree.evict(10)) == [10, 11, 12, 21, 22, 30, 31]


def test_what_a_branch_keeps_is_told_under_a_namespace_of_its_own() -> None:
    mirror = Mirror(PAGE)
    tree = PrefixTree(PAGE, EVICTION_POLICIES["lru"], listener=mirror)
    keep(tree, "a", [1, 2, 3, 4], [10, 11])
    keep(tree, Branch(base="a", first_token=2, name="x"), [1, 2, 3, 4, 5, 6], [20, 21, 22])
    told = {(name, number) for (name, _, _), number in mirror.content.items()}
    assert told == {("a", 10), ("a", 11), ("2:x\0a", 21), ("2:x\0a", 22)}
    tree.evict(4)
    assert not mirror.content


def test_inserting_again_keeps_the_pages_that_were_there() -> None:
    tree = make_tree()
    keep(tree, "", [1, 2, 3, 4], [10, 11])
    _, pages = tree.insert("", token_key([1, 2, 3, 4, 5, 6]), [20, 21, 22])
    assert pages == [10, 11, 22]
    assert tree.num_pages == 3


def test_locked_prefixes_stay_and_the_rest_goes_leaves_first() -> None:
    tree = make_tree()
    node = keep(tree, "", [1, 2], [10])
    keep(tree, "", [1, 2, 3, 4], [10, 11])
    keep(tree, "", [1, 2, 5, 6], [10, 12])
    tree.lock(node)
    assert tree.num_evictable_pages == 2
    assert sorted(tree.evict(5)) == [11, 12]
    assert matched_tokens(tree, "", [1, 2]) == 2
    tree.unlock(node)
    assert tree.evict(5) == [10]
    assert list(tree.nodes()) == []


def test_lru_forgets_the_prefix_used_longest_ago() -> None:
    tree = make_tree("lru")
    keep(tree, "", [1, 1], [10])
    keep(tree, "", [2, 2], [20])
    hit(tree, [1, 1])
    assert tree.evict(1) == [20]


def test_lfu_forgets_the_prefix_used_least_often() -> None:
    tree = make_tree("lfu")
    keep(tree, "", [1, 1], [10])
    for _ in range(3):
        hit(tree, [1, 1])
    keep(tree, "", [2, 2], [20])
    assert tree.evict(1) == [20]


@pytest.mark.parametrize("policy", sorted(EVICTION_POLICIES))
def test_a_prefix_that_was_only_locked_does_not_count_as_used(policy: str) -> None:
    tree = make_tree(policy)
    first = keep(tree, "", [1, 1], [10])
    keep(tree, "", [2, 2], [20])
    for _ in range(50):
        tree.lock(first)
        tree.unlock(first)
    assert tree.evict(1) == [10]


@pytest.mark.parametrize("policy", sorted(EVICTION_POLICIES))
def test_repeats_cost_and_leave_no_more_than_the_first(policy: str) -> None:
    """What a request does whose prompt is known: it hits its prefix and inserts it again."""
    num_keys = 0
    key_of = EVICTION_POLICIES[policy]

    def counted(num_hits: int, last_used: int) -> tuple[int, int]:
        nonlocal num_keys
        num_keys += 1
        return key_of(num_hits, last_used)

    tree = PrefixTree(PAGE, counted)
    prompt = [1, 2, 3, 4]
    keep(tree, "", prompt, [10, 11])
    for _ in range(2000):
        node = tree.match("", token_key(prompt[:2])).node
        tree.lock(node)
        tree.count_hit(node)
        again = keep(tree, "", prompt, [10, 11])
        tree.lock(again)
        tree.unlock(node)
        tree.unlock(again)
    assert num_keys <= 2000
    assert len(tree._leaves) <= len(list(tree.nodes())) == 2
    assert tree.evict(5) == [11, 10]


def test_a_long_leaf_gives_only_what_is_needed() -> None:
    tree = make_tree()
    keep(tree, "", [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert tree.evict(1) == [12]
    assert matched_tokens(tree, "", [1, 2, 3, 4, 5, 6]) == 4


def test_unlocking_more_often_than_locking_is_noticed() -> None:
    tree = make_tree()
    node = keep(tree, "", [1, 2], [10])
    with pytest.raises(AssertionError, match="unlocked more often"):
        tree.unlock(node)


def test_empty_namespaces_are_forgotten() -> None:
    tree = make_tree()
    for index in range(100):
        keep(tree, f"tenant-{index}", [1, 2], [index])
    tree.evict(100)
    assert tree._roots == {}


def next_evictions(tree: PrefixTree, policy: str, num_pages: int) -> list[int]:
    """The pages that `evict` must give, found by looking at every node for each of them."""
    pages = {node: list(node.pages) for node in tree.nodes()}
    gone: list[int] = []
    while len(gone) < num_pages:
        parents = {node.parent for node in pages}
        leaves = [node for node in pages if node not in parents and not node.num_locks]
        if not leaves:
            break
        key_of = EVICTION_POLICIES[policy]
        first = min(leaves, key=lambda node: key_of(node.num_hits, node.last_used))
        gone.append(pages[first].pop())
        if not pages[first]:
            del pages[first]
    return gone


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=examples(1000))
@given(
    policy=st.sampled_from(sorted(EVICTION_POLICIES)),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["insert", "match", "lock", "hit", "unlock", "evict"]),
            st.sampled_from(
                [
                    "",
                    "x",
                    Branch(base="x", first_token=0, name="b"),
                    Branch(base="x", first_token=2, name="b"),
                    Branch(base="x", first_token=6, name="c"),
                ]
            ),
            TOKENS,
            st.integers(1, 6),
        ),
        max_size=40,
    ),
)
def test_the_tree_agrees_with_a_set_of_prefixes(
    policy: str, actions: list[tuple[str, Namespace, list[int], int]]
) -> None:
    tree = make_tree(policy)
    known: dict[tuple[Namespace, tuple[int, ...]], int] = {}
    locked: list[tuple[Node, Namespace, list[int], list[int]]] = []
    next_page = 0

    def place(namespace: Namespace, tokens: list[int]) -> tuple[Namespace, tuple[int, ...]]:
        is_shared = isinstance(namespace, Branch) and len(tokens) <= namespace.first_token
        return base_of(namespace) if is_shared else namespace, tuple(tokens)

    def longest(namespace: Namespace, tokens: list[int]) -> int:
        length = 0
        while length + PAGE <= len(tokens) and place(namespace, tokens[: length + PAGE]) in known:
            length += PAGE
        return length

    for action, namespace, tokens, count in actions:
        whole = tokens[: len(tokens) // PAGE * PAGE]
        if action == "insert" and whole:
            pages = list(range(next_page, next_page + len(whole) // PAGE))
            next_page += len(pages)
            _, kept = tree.insert(namespace, token_key(whole), pages)
            for index, page in enumerate(kept):
                prefix = place(namespace, whole[: (index + 1) * PAGE])
                assert known.setdefault(prefix, page) == page
        elif action == "match":
            assert matched_tokens(tree, namespace, tokens) == longest(namespace, tokens)
        elif action in ("lock", "hit"):
            found = tree.match(namespace, token_key(whole))
            tree.lock(found.node)
            if action == "hit":
                tree.count_hit(found.node)
            length = longest(namespace, whole)
            assert len(found.pages) * PAGE == length
            locked.append((found.node, namespace, whole[:length], found.pages))
        elif action == "unlock" and locked:
            tree.unlock(locked.pop(count % len(locked))[0])
        elif action == "evict":
            expected = next_evictions(tree, policy, count)
            gone = set(tree.evict(count))
            assert gone == set(expected)
            known = {prefix: page for prefix, page in known.items() if page not in gone}
        for _, space, prefix, pages in locked:
            held = [known[place(space, prefix[: (i + 1) * PAGE])] for i in range(len(pages))]
            assert held == pages, "a locked prefix was evicted"
        assert tree.num_pages == len(known) == sum(len(node.pages) for node in tree.nodes())
        unlocked = sum(len(node.pages) for node in tree.nodes() if node.num_locks == 0)
        assert tree.num_evictable_pages == unlocked
        tree.check()
    for node, *_ in locked:
        tree.unlock(node)
    assert sorted(tree.evict(10**6)) == sorted(known.values())
