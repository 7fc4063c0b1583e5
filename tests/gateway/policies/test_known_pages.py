"""What workers' caches are known to hold, and who is chosen for it."""

from __future__ import annotations

import json
from array import array

from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.policies.cache_aware import CacheAware
from sapwood.gateway.policies.interface import Balance, Call
from sapwood.gateway.policies.known_pages import KnownPages, PageSet, token_ids
from sapwood.schema.kv_events import DEVICE_TIER, HOST_TIER
from tests.gateway.policies.test_policies import State, workers
from tests.memory.event_follower import names_of

PROMPT = list(range(100, 200))


def names(ids: list[int], page_size: int) -> list[int]:
    whole = ids[: len(ids) // page_size * page_size]
    return names_of("", array("I", whole).tobytes(), 4 * page_size)


def hold(known: KnownPages, worker: State, ids: list[int], page_size: int = 4) -> PageSet:
    (cache,) = known.begin(worker.id, 1)
    cache.add(names(ids, page_size), page_size)
    return cache


def test_the_longest_beginning_is_found_whatever_the_page_sizes() -> None:
    known = KnownPages()
    one, two, three = workers(0, 0, 0)
    hold(known, one, PROMPT[:40])
    hold(known, two, PROMPT[:48], page_size=16)
    hold(known, three, PROMPT[50:])
    ids = array("I", PROMPT)
    assert known.holders(ids, [one.id, two.id, three.id]) == (48, [two.id])
    assert known.holders(ids, [one.id, three.id]) == (40, [one.id])
    assert known.holders(ids, [three.id]) == (0, [three.id])
    assert known.holders(array("I", PROMPT[:40]), [one.id]) == (36, [one.id]), "one is computed"


def test_a_cache_of_any_replica_counts_and_a_page_without_those_before_does_not() -> None:
    known = KnownPages()
    (one,) = workers(0)
    first, second = known.begin(one.id, 2)
    first.add(names(PROMPT, 4)[1:], 4)
    assert known.holders(array("I", PROMPT), [one.id])[0] == 0
    second.add(names(PROMPT, 4)[:2], 4)
    assert known.holders(array("I", PROMPT), [one.id])[0] == 8
    second.remove(names(PROMPT, 4)[1:2])
    assert known.holders(array("I", PROMPT), [one.id])[0] == 4
    known.end(one.id)
    assert not known.follows_all([one.id])


def policy(known: KnownPages) -> CacheAware:
    return CacheAware(threshold=0.3, balance=Balance(), max_tree_bytes=2**20, known=known)


def call(ids: list[int]) -> Call:
    spelled = json.dumps(ids).encode()
    return Call(text=spelled, ids=spelled)


def test_the_least_loaded_of_those_who_hold_a_prompt_is_chosen() -> None:
    known = KnownPages()
    one, two, three = workers(0, 5, 2)
    hold(known, one, [])
    hold(known, two, PROMPT)
    cache = hold(known, three, PROMPT)
    chooses = policy(known)
    assert chooses.choose([one, two, three], call(PROMPT)) is three
    assert chooses.prefixes.num_known_bytes > 0.9 * chooses.prefixes.num_bytes
    cache.names.clear()
    assert chooses.choose([one, two, three], call(PROMPT)) is two
    assert chooses.choose([one, two, three], call([7] * 100)) is one, "nobody has it"


def test_without_events_of_all_workers_the_prompts_they_were_sent_count() -> None:
    known = KnownPages()
    one, two = workers(0, 0)
    hold(known, one, PROMPT)
    chooses = policy(known)
    (chosen, again) = (chooses.choose([two, one], call(PROMPT)) for _ in range(2))
    assert chosen is again is two


@given(st.recursive(st.integers() | st.text() | st.none(), lambda inner: st.lists(inner)))
def test_any_json_is_taken_as_ids_or_not(value: object) -> None:
    found = token_ids(json.dumps(value).encode())
    assert found is None or found.tolist() in (value, value[0])


def test_one_prompt_of_several_is_looked_up() -> None:
    assert token_ids(b"[[1, 2], [3]]") == array("I", [1, 2])
    assert token_ids(b"[1, true]") is token_ids(b"[-1]") is token_ids(b'"1"') is None


def test_a_page_is_known_while_any_tier_has_it() -> None:
    known, (one, other) = KnownPages(), workers(0, 0)
    first, second = hold(known, one, PROMPT), hold(known, other, PROMPT)
    second.remove(names(PROMPT, 4), DEVICE_TIER)
    assert known.num_pages(other.id) == 0
    second.add(names(PROMPT, 4), 4, HOST_TIER)
    second.add(names(PROMPT, 4), 4, "a tier of another engine")
    second.remove(names(PROMPT, 4), HOST_TIER)
    best, holders = known.holders(array("I", PROMPT), [other.id, one.id])
    assert holders == [one.id, other.id], "first who has it on the device"
    assert best > 0
    first.remove(names(PROMPT, 4), DEVICE_TIER)
    assert known.holders(array("I", PROMPT), [one.id, other.id]) == (best, [other.id])
    second.remove(names(PROMPT, 4))
    assert known.holders(array("I", PROMPT), [one.id, other.id])[0] == 0
