"""Policies over worker states, without any HTTP."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.policies.bucket import Bucket, bounds
from sapwood.gateway.policies.cache_aware import RECENT_BYTES, CacheAware
from sapwood.gateway.policies.hashing import BoundedLoad, ConsistentHashing, PrefixHash
from sapwood.gateway.policies.interface import Balance, Call, Policy
from sapwood.gateway.policies.manual import Manual
from sapwood.gateway.policies.plain import PowerOfTwo, Random, RoundRobin
from sapwood.gateway.policies.registry import make_policy
from sapwood.schema.config.gateway import POLICIES, GatewayConfig


@dataclass
class State:
    id: str
    load: float = 0


def workers(*loads: float) -> list[State]:
    return [State(f"http://worker-{index}:30000", load) for index, load in enumerate(loads)]


def rng() -> random.Random:
    return random.Random(7)


loads = st.lists(st.integers(0, 200), min_size=1, max_size=8)


@pytest.mark.parametrize("name", POLICIES)
@given(loads=loads, texts=st.lists(st.binary(max_size=40), max_size=10), key=st.text(max_size=3))
def test_every_policy_chooses_one_of_the_candidates(
    name: str, loads: list[int], texts: list[bytes], key: str
) -> None:
    policy = make_policy(GatewayConfig(policy=name), rng())
    candidates = workers(*loads)
    for text in texts:
        assert policy.choose(candidates, Call(text=text, key=key)) in candidates
        # A worker may be gone in the next moment.
        policy.forget(candidates[0].id)
        assert policy.choose(candidates[-1:], Call(text=text, key=key)) is candidates[-1]


def test_random_chooses_all() -> None:
    policy, candidates = Random(rng()), workers(0, 0, 0)
    counts = Counter(policy.choose(candidates, Call()).id for _ in range(300))
    assert len(counts) == 3
    assert min(counts.values()) > 50


def test_round_robin_takes_turns() -> None:
    policy, candidates = RoundRobin(), workers(9, 0, 5)
    assert [policy.choose(candidates, Call()) for _ in range(6)] == candidates * 2


@given(loads=st.lists(st.integers(0, 9), min_size=2, max_size=8, unique=True))
def test_power_of_two_never_takes_the_most_loaded(loads: list[int]) -> None:
    policy, candidates = PowerOfTwo(rng()), workers(*loads)
    worst = max(candidates, key=lambda one: one.load)
    assert all(policy.choose(candidates, Call()) is not worst for _ in range(20))


def cache_aware(**options: float) -> CacheAware:
    balance = Balance(abs_threshold=options.pop("abs", 64), rel_threshold=1.5)
    return CacheAware(
        threshold=options.pop("threshold", 0.3),
        balance=balance,
        max_tree_bytes=1 << 20,
        min_match_bytes=int(options.pop("min", 0)),
    )


def test_conversations_stay_where_they_began() -> None:
    policy, candidates = cache_aware(), workers(0, 0, 0, 0)
    texts = {number: b"%03d is a conversation: " % number for number in range(40)}
    places = {}
    for turn in range(5):
        for number in texts:
            texts[number] += b" and then turn %d" % turn
            place = policy.choose(candidates, Call(text=texts[number])).id
            assert places.setdefault(number, place) == place
    # New ones are spread evenly.
    assert set(Counter(places.values()).values()) == {10}


@pytest.mark.parametrize("num_systems", [1, 3])
def test_conversations_that_begin_alike_are_spread_and_stay(num_systems: int) -> None:
    policy, candidates = cache_aware(), workers(0, 0, 0, 0)
    random_ = rng()
    texts = [b"[%d system" % (n % num_systems) + b"s" * 200 for n in range(40)]
    places: dict[int, str] = {}
    for turn in range(4):
        for number in random_.sample(range(40), 40):
            texts[number] += b",%d.%d" % (number, turn) + random_.randbytes(100)
            place = policy.choose(candidates, Call(text=texts[number] + b"]")).id
            assert places.setdefault(number, place) == place
    counts = Counter(places.values())
    assert len(counts) == 4
    assert min(counts.values()) >= 5, counts
    # Each system prompt was new to each worker once at most, and each message once.
    assert policy.prefixes.num_known_bytes > policy.prefixes.num_bytes * 0.7


def test_what_was_given_long_ago_counts_no_more() -> None:
    policy, candidates = cache_aware(), workers(0, 0)
    policy.choose(candidates, Call(text=b"a" * (RECENT_BYTES - 10)))
    first = policy.choose(candidates, Call(text=b"a" * (RECENT_BYTES - 10) + b"b"))
    # A worker that comes later gets what is new until it has had its share of lately, not of all.
    for n in range(400):
        policy.choose([first], Call(text=b"%d" % n + b"c" * 40_000))
    later = [first, *workers(0, 0, 0)[2:]]
    counts = Counter(
        policy.choose(later, Call(text=b"x%d" % n + b"d" * 40_000)) is first for n in range(400)
    )
    assert counts[False] - counts[True] <= 2 * RECENT_BYTES // 40_000


def test_a_small_shared_part_does_not_bind() -> None:
    policy, candidates = cache_aware(threshold=0.5), workers(0, 0)
    first = policy.choose(candidates, Call(text=b"system" + b"a" * 20))
    assert policy.choose(candidates, Call(text=b"system" + b"b" * 20)) is not first
    assert policy.choose(candidates, Call(text=b"system" + b"a" * 20 + b"c" * 9)) is first


def test_the_json_around_short_messages_does_not_bind() -> None:
    policy, candidates = cache_aware(min=128), workers(0, 0, 0, 0)
    texts = (b'[{"role":"user","content":"%d"}]' % number for number in range(40))
    counts = Counter(policy.choose(candidates, Call(text=text)).id for text in texts)
    assert set(counts.values()) == {10}


def test_load_counts_more_than_the_cache_when_workers_are_unbalanced() -> None:
    policy, candidates = cache_aware(abs=10), workers(0, 0)
    first = policy.choose(candidates, Call(text=b"hello"))
    other = next(one for one in candidates if one is not first)
    first.load = 10
    assert policy.choose(candidates, Call(text=b"hello")) is first
    first.load = 11
    assert policy.choose(candidates, Call(text=b"hello")) is other


def test_a_worker_that_was_down_has_an_empty_cache() -> None:
    policy, candidates = cache_aware(), workers(0, 0)
    first = policy.choose(candidates, Call(text=b"hello"))
    policy.choose(candidates, Call(text=b"another"))
    policy.forget(first.id)
    first.load = 1
    assert policy.choose(candidates, Call(text=b"hello")) is not first


@given(keys=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=50, unique=True))
def test_consistent_hashing_moves_only_the_keys_of_a_worker_that_goes(keys: list[str]) -> None:
    candidates = workers(0, 0, 0, 0)
    before = {key: ConsistentHashing(rng()).choose(candidates, Call(key=key)).id for key in keys}
    gone = candidates.pop(1)
    for key in keys:
        # Another gateway, which lists the workers in another order, chooses alike.
        after = ConsistentHashing(random.Random(1)).choose(candidates[::-1], Call(key=key)).id
        assert after == before[key] or before[key] == gone.id


def test_consistent_hashing_spreads_keys() -> None:
    policy, candidates = ConsistentHashing(rng()), workers(0, 0, 0, 0)
    counts = Counter(policy.choose(candidates, Call(key=str(key))).id for key in range(400))
    assert min(counts.values()) > 60


def prefix_policies() -> list[Policy]:
    return [
        PrefixHash(num_tokens=2, load_factor=1.25),
        BoundedLoad(num_tokens=2, load_factor=1.25),
    ]


@pytest.mark.parametrize("policy", prefix_policies())
def test_equal_beginnings_go_to_one_worker(policy: Policy) -> None:
    candidates = workers(0, 0, 0, 0)
    places = {policy.choose(candidates, Call(text=b"8 bytes." + b"%d" % n)).id for n in range(20)}
    assert len(places) == 1
    texts = [b"%d bytes and more" % number for number in range(40)]
    assert len({policy.choose(candidates, Call(text=text)).id for text in texts}) == 4


@pytest.mark.parametrize("policy", prefix_policies())
@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=8), text=st.binary(max_size=8))
def test_no_worker_takes_much_more_than_its_share(
    policy: Policy, loads: list[int], text: bytes
) -> None:
    chosen = policy.choose(workers(*loads), Call(text=text))
    assert chosen.load + 1 <= 1.25 * (sum(loads) + 1) / len(loads) + 1


def test_bounded_load_follows_the_key_and_not_the_text() -> None:
    policy, candidates = BoundedLoad(num_tokens=8, load_factor=1.25), workers(0, 0, 0, 0)
    places = {policy.choose(candidates, Call(key="k", text=b"%d" % n)).id for n in range(20)}
    assert len(places) == 1
    (place,) = places
    for one in candidates:
        one.load = 8 if one.id == place else 0
    assert policy.choose(candidates, Call(key="k")).id != place


def test_manual_keeps_a_keys_worker_while_it_can() -> None:
    policy, candidates = Manual(mode="random", max_idle_s=10, rng=rng()), workers(0, 0, 0)
    first = policy.choose(candidates, Call(key="k"))
    first.load = 1000
    assert all(policy.choose(candidates, Call(key="k")) is first for _ in range(10))
    rest = [one for one in candidates if one is not first]
    second = policy.choose(rest, Call(key="k"))
    # It stays there: the conversation's cache has moved.
    assert policy.choose(candidates, Call(key="k")) is second


@pytest.mark.parametrize("mode", ["min_load", "min_group"])
def test_manual_spreads_new_keys(mode: str) -> None:
    policy, candidates = Manual(mode=mode, max_idle_s=10, rng=rng()), workers(0, 0, 0)
    for key in range(30):
        policy.choose(candidates, Call(key=str(key))).load += 1
    assert [one.load for one in candidates] == [10, 10, 10]


def test_manual_forgets_idle_keys() -> None:
    now = 0.0
    policy = Manual(mode="min_load", max_idle_s=10, rng=rng(), clock=lambda: now)
    candidates = workers(0, 1)
    assert policy.choose(candidates, Call(key="k")) is candidates[0]
    candidates[0].load = 5
    now = 10.0
    assert policy.choose(candidates, Call(key="k")) is candidates[0]
    now = 20.1
    assert policy.choose(candidates, Call(key="k")) is candidates[1]


def test_bucket_keeps_short_and_long_prompts_apart() -> None:
    now = 0.0
    policy = Bucket(interval_s=5, balance=Balance(), clock=lambda: now)
    candidates = workers(0, 0)
    for _ in range(10):
        policy.choose(candidates, Call(text=b"x" * 10))
        policy.choose(candidates, Call(text=b"x" * 1000))
    now = 5.0
    policy.choose(candidates, Call())
    assert policy.choose(candidates, Call(text=b"x" * 12)) is candidates[0]
    assert policy.choose(candidates, Call(text=b"x" * 1001)) is candidates[1]
    candidates[1].load = 65
    assert policy.choose(candidates, Call(text=b"x" * 1001)) is candidates[0]


@given(st.lists(st.integers(0, 10_000), max_size=60), st.integers(1, 8))
def test_bounds_ascend_and_share_the_bytes(lengths: list[int], num_buckets: int) -> None:
    found = bounds(lengths, num_buckets)
    assert len(found) == num_buckets - 1
    assert found == sorted(found)
    if sum(lengths):
        edges = [-1, *found, 10_001]
        for low, high in pairwise(edges):
            inside = sum(length for length in lengths if low < length < high)
            assert inside <= sum(lengths) / num_buckets + 1
