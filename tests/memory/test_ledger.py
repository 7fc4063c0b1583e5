from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from sapwood.memory.eviction import least_recently_used
from sapwood.memory.lease import Lease
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree, token_key
from sapwood.schema.cache import FULL_POOL, CacheKind, CachePool

PAGE = 4


def make_ledger(num_pages: int = 16, *, keep_prefixes: bool = True) -> Ledger:
    tree = PrefixTree(PAGE, least_recently_used) if keep_prefixes else None
    return Ledger(num_pages=num_pages, page_size=PAGE, tree=tree)


def test_a_released_prefix_is_hit_by_the_next_lease() -> None:
    ledger = make_ledger()
    prompt = list(range(10))
    lease, num_hit = ledger.lease("", token_key(prompt))
    assert num_hit == 0
    assert ledger.reserve(lease, len(prompt))
    ledger.commit(lease, token_key(prompt))
    pages = list(lease.pages)
    ledger.release(lease)
    again, num_hit = ledger.lease("", token_key(prompt))
    assert num_hit == 8
    assert again.pages == pages[:2]
    ledger.check()


def test_the_last_token_is_always_computed() -> None:
    ledger = make_ledger()
    prompt = list(range(8))
    lease, _ = ledger.lease("", token_key(prompt))
    assert ledger.reserve(lease, 8)
    ledger.commit(lease, token_key(prompt))
    _, num_hit = ledger.lease("", token_key(prompt))
    assert num_hit == 4


def test_a_second_copy_of_a_prefix_is_given_up_for_the_first() -> None:
    ledger = make_ledger()
    key = token_key(range(8))
    first, _ = ledger.lease("", key)
    second, _ = ledger.lease("", key)
    assert ledger.reserve(first, 8)
    assert ledger.reserve(second, 9)
    assert second.take_changes() == (0, second.pages)
    ledger.commit(first, key)
    free = ledger.num_free_pages
    ledger.commit(second, key)
    assert second.pages[:2] == first.pages
    assert ledger.num_free_pages == free + 2
    assert second.take_changes() == (0, second.pages)
    ledger.check()


def test_room_is_made_by_forgetting_what_nobody_uses() -> None:
    ledger = make_ledger(num_pages=4)
    old, _ = ledger.lease("", token_key(range(8)))
    assert ledger.reserve(old, 8)
    ledger.commit(old, token_key(range(8)))
    ledger.release(old)
    assert ledger.num_free_pages == 2
    fresh, _ = ledger.lease("", token_key(range(100, 116)))
    assert ledger.reserve(fresh, 16)
    assert not ledger.reserve(fresh, 17)
    assert ledger.num_available_pages == 0
    ledger.check()


def test_without_a_tree_every_page_is_private() -> None:
    ledger = make_ledger(keep_prefixes=False)
    lease, _ = ledger.lease("", token_key(range(8)))
    assert ledger.reserve(lease, 8)
    ledger.commit(lease, token_key(range(8)))
    ledger.release(lease)
    assert ledger.num_free_pages == ledger.num_pages
    assert ledger.lease("", token_key(range(8)))[1] == 0


def test_what_would_be_available_without_leases_is_what_is_once_they_are_released() -> None:
    ledger = make_ledger(num_pages=12)
    leases = []
    for tokens in ([*range(8), 50], [*range(8), 60, 61, 62, 63, 64], list(range(20, 29))):
        lease, _ = ledger.lease("", token_key(tokens))
        assert ledger.reserve(lease, len(tokens))
        ledger.commit(lease, token_key(tokens))
        leases.append(lease)
    first, second, third = leases
    asked = ledger.without_leases()
    available = asked.num_available_pages
    asked.leave_out(first)
    assert asked.num_available_pages == available + 1, "the shared pages are still in use"
    asked.leave_out(second)
    assert asked.num_available_pages == available + 5
    asked.leave_out(third)
    asked.keep(second)
    assert asked.num_available_pages == available + 4
    assert ledger.num_available_pages == available
    ledger.release(first)
    ledger.release(third)
    assert ledger.num_available_pages == available + 4


def check_without(ledger: Ledger, leases: list[Lease], rng: random.Random) -> None:
    """Releases the leases, after having asked what that would bring."""
    asked = ledger.without_leases()
    for lease in leases:
        asked.leave_out(lease)
    for lease in rng.sample(leases, rng.randint(0, len(leases))):
        asked.keep(lease)
        asked.leave_out(lease)
    expected = asked.num_available_pages
    for lease in leases:
        ledger.release(lease)
    assert ledger.num_available_pages == expected


@pytest.mark.parametrize("seed", range(30))
def test_no_page_is_leaked_or_owned_twice(seed: int) -> None:
    rng = random.Random(seed)
    ledger = make_ledger(num_pages=24)
    open_leases = []
    for _ in range(300):
        action = rng.random()
        if action < 0.4:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
            lease, num_hit = ledger.lease(rng.choice(["", "x"]), token_key(tokens))
            if ledger.reserve(lease, len(tokens)):
                open_leases.append((lease, tokens))
                assert num_hit < len(tokens)
            else:
                ledger.release(lease)
        elif action < 0.5:
            left_out = rng.sample(open_leases, rng.randint(0, len(open_leases)))
            check_without(ledger, [lease for lease, _ in left_out], rng)
            for entry in left_out:
                open_leases.remove(entry)
        elif open_leases:
            lease, tokens = rng.choice(open_leases)
            if action < 0.7:
                ledger.commit(lease, token_key(tokens[: rng.randint(0, len(tokens))]))
            else:
                open_leases.remove((lease, tokens))
                ledger.release(lease)
        ledger.check()
    for lease, _ in open_leases:
        ledger.release(lease)
    ledger.flush()
    assert ledger.num_free_pages == ledger.num_pages


@dataclass
class Reading:
    """Somebody reads what a lease held at some time."""

    lease: Lease
    pages: list[int]
    windows: list[list[int]]


def begin_reading(ledger: Ledger, lease: Lease) -> Reading:
    ledger.begin_read(lease)
    windows = [held.pages[held.first :] for held in lease.windows]
    return Reading(lease, list(lease.pages), windows)


def check_reading(ledger: Ledger, reading: Reading) -> None:
    """Nobody else may write to the pages that are read: none is free, and none another's own."""
    for pool, pages in enumerate((reading.pages, *reading.windows)):
        taken = set(pages)
        assert taken.isdisjoint(ledger._allocators[pool]._free)
        for other in ledger._leases:
            table = other.pages if pool == 0 else other.windows[pool - 1].pages
            if other is not reading.lease:
                assert taken.isdisjoint(table[other.num_shared :])


@pytest.mark.parametrize("seed", range(30))
def test_what_is_read_stays_until_the_reader_is_done(seed: int) -> None:
    rng = random.Random(seed)
    ledger = make_pools((FULL_POOL, 24), (window_of(6), 14))
    requests: list[tuple[Lease, list[int], int]] = []
    readings: list[Reading] = []
    for _ in range(400):
        action = rng.random()
        if action < 0.2:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
            lease, num_hit = ledger.lease("", token_key(tokens))
            if ledger.reserve(lease, len(tokens), num_hit):
                requests.append((lease, tokens, num_hit))
            else:
                ledger.release(lease)
        elif action < 0.35 and requests:
            readings.append(begin_reading(ledger, rng.choice(requests)[0]))
        elif action < 0.55 and readings:
            ledger.end_read(readings.pop(rng.randrange(len(readings))).lease)
        elif requests:
            index = rng.randrange(len(requests))
            lease, tokens, start = requests[index]
            if action < 0.7:
                ledger.commit(lease, token_key(tokens))
            elif action < 0.85:
                more = [*tokens, rng.randrange(2)]
                if ledger.reserve(lease, len(more), len(tokens)):
                    requests[index] = (lease, more, start)
            else:
                ledger.release(lease)
                del requests[index]
        ledger.check()
        for reading in readings:
            check_reading(ledger, reading)
    for lease, _, _ in requests:
        ledger.release(lease)
    for reading in readings:
        ledger.end_read(reading.lease)
    ledger.flush()
    assert [one.num_free for one in ledger._allocators] == ledger.pool_sizes


# ---- windows and states --------------------------------------------------------------------------

STATES = CachePool(CacheKind.STATE, (1,))


def window_of(num_tokens: int) -> CachePool:
    return CachePool(CacheKind.WINDOW, (0,), num_tokens)


def make_pools(*pools: tuple[CachePool, int], state_interval: int = PAGE) -> Ledger:
    kinds = [pool for pool, _ in pools]
    return Ledger(
        num_pages=[size for _, size in pools],
        page_size=PAGE,
        tree=PrefixTree(PAGE, least_recently_used, kinds),
        pools=kinds,
        state_interval=state_interval,
    )


def compute(ledger: Ledger, lease: Lease, start: int, end: int, num_prompt: int) -> list[int]:
    """What a scheduler does for a step. Returns the copies that the step begins with."""
    assert ledger.reserve(lease, end, start, end)
    copies = lease.take_copies()
    ledger.keep_state(lease, end, num_prompt)
    return [number for copy in copies for number in copy]


def test_pages_behind_a_window_are_given_back_while_a_request_grows() -> None:
    ledger = make_pools((window_of(6), 3))
    lease, _ = ledger.lease("", token_key(range(1)))
    for end in range(1, 60):
        compute(ledger, lease, end - 1, end, 1)
        ledger.check()
        (held,) = lease.windows
        assert len(held.pages) - held.first <= 3
    assert ledger.available() == [0] or ledger.available() == [1]
    ledger.release(lease)
    assert ledger.available() == [3]


def test_a_prefix_ends_where_its_window_has_all_pages() -> None:
    ledger = make_pools((FULL_POOL, 20), (window_of(5), 8))
    key = token_key(range(24))
    lease, _ = ledger.lease("", key)
    for start in range(0, 24, 8):
        compute(ledger, lease, start, start + 8, 24)
        ledger.commit(lease, token_key(range(start + 8)))
    ledger.release(lease)
    # Of 24 tokens the window pool still has all it was given; the first of them go when room is
    # needed, and then only a longer prefix than theirs can be used.
    other, _ = ledger.lease("", token_key(range(100, 130)))
    assert ledger.reserve(other, 20, 0, 20)
    ledger.check()
    assert ledger.lease("", token_key([*range(8), 99]))[1] == 0
    assert ledger.lease("", token_key(range(25)))[1] == 24
    ledger.check()


def test_a_state_is_found_only_where_it_was_kept_and_is_copied() -> None:
    ledger = make_pools((FULL_POOL, 20), (STATES, 4), state_interval=8)
    prompt = list(range(14))
    assert [ledger.needs.end_of_step(start, 14, 14) for start in (0, 8, 12)] == [8, 12, 14]
    lease, _ = ledger.lease("", token_key(prompt))
    assert compute(ledger, lease, 0, 8, 14) == []
    first = lease.state.kept[0][1]
    assert compute(ledger, lease, 8, 12, 14)[0] == first, "it goes on from a copy"
    assert compute(ledger, lease, 12, 14, 14) != []
    ledger.commit(lease, token_key(prompt))
    ledger.check()
    again, num_hit = ledger.lease("", token_key(prompt))
    assert num_hit == 12
    source, target = compute(ledger, again, 12, 14, 14)
    assert source != target
    third, num_hit = ledger.lease("", token_key([*range(11), 99]))
    assert num_hit == 8, "no state is kept after 9, 10 or 11 tokens, whose pages are known"
    for one in (lease, again, third):
        ledger.release(one)
    ledger.check()


def test_the_only_slot_passes_from_a_kept_state_to_the_request_that_hits_it() -> None:
    ledger = make_pools((FULL_POOL, 20), (STATES, 1))
    prompt = list(range(9))
    lease, _ = ledger.lease("", token_key(prompt))
    compute(ledger, lease, 0, 8, 9)
    assert compute(ledger, lease, 8, 9, 9) == [], "there is no slot for a copy: it goes on in place"
    ledger.commit(lease, token_key(prompt))
    ledger.release(lease)
    assert ledger.lease("", token_key(prompt))[1] == 0, "the state is gone"
    other, _ = ledger.lease("x", token_key(prompt))
    compute(ledger, other, 0, 8, 9)
    ledger.commit(other, token_key(prompt[:8]))
    ledger.release(other)
    hit, num_hit = ledger.lease("x", token_key(prompt))
    assert num_hit == 8
    assert compute(ledger, hit, 8, 9, 9) == []
    ledger.check()


def test_no_state_comes_back_into_a_slot_that_the_same_plan_copies_from() -> None:
    ledger = make_pools((FULL_POOL, 20), (STATES, 2))
    prompt, others = list(range(9)), list(range(100, 109))
    lease, _ = ledger.lease("", token_key(prompt))
    compute(ledger, lease, 0, 8, 9)
    ledger.commit(lease, token_key(prompt[:8]))
    ledger.release(lease)
    hit, num_hit = ledger.lease("", token_key(prompt))
    assert num_hit == 8
    assert ledger.reserve(hit, 9, 8, 9)
    # The tree's state is all that could make room, and the plan has yet to copy it.
    other, _ = ledger.lease("", token_key(others))
    available = ledger.available()
    assert ledger.restore(other, token_key(others[:8])) is None
    assert ledger.available() == available
    ((source, _),) = hit.take_copies()
    restored = ledger.restore(other, token_key(others[:8]))
    assert restored is not None, "the next plan may write there"
    assert restored[-1] == (1, 1, source)
    ledger.check()


def most_tokens(ledger: Ledger) -> int | None:
    return ledger.needs.most_tokens(ledger.pool_sizes, 4)


def test_a_window_pool_that_is_too_small_limits_requests() -> None:
    assert most_tokens(make_pools((window_of(6), 4))) is None
    assert most_tokens(make_pools((window_of(60), 4))) == 4 * PAGE
    assert most_tokens(make_pools((FULL_POOL, 9), (window_of(6), 4))) == 9 * PAGE
