"""Messages in any order, lost, doubled, and sent again."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.kv_numbers import EventNumbers
from sapwood.gateway.policies.known_pages import PageSet
from sapwood.schema.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch


def batch(*events: object) -> bytes:
    return msgspec.msgpack.encode(KVEventBatch(1.0, list(events), 0))


def stored(name: int) -> bytes:
    return batch(BlockStored([name], None, [1, 2], 2, None, "GPU"))


def held(numbers: EventNumbers) -> list[int]:
    return list(numbers.pages.names)


@pytest.fixture
def numbers() -> EventNumbers:
    numbers = EventNumbers(PageSet(), can_replay=True)
    assert numbers.begin() == 0
    numbers.end_replay()
    return numbers


def test_events_are_applied(numbers: EventNumbers) -> None:
    assert numbers.take(0, stored(5)) is None
    assert (
        numbers.take(1, batch(BlockRemoved([5, 9]), BlockStored([6], 5, [1, 2], 2, None))) is None
    )
    assert (held(numbers), numbers.pages.page_size) == ([6], 2)
    numbers.take(2, batch(AllBlocksCleared()))
    assert held(numbers) == []


def test_a_gap_is_filled_and_doubles_are_skipped(numbers: EventNumbers) -> None:
    numbers.take(0, stored(10))
    assert numbers.take(3, stored(13)) == 1, "asks from there on"
    assert numbers.take(4, stored(14)) is None
    for number in (1, 2, 3):
        numbers.take_again(number, stored(10 + number))
    numbers.end_replay()
    assert (held(numbers), numbers.num_gaps) == ([10, 11, 12, 13, 14], 0)


def test_after_a_gap_that_nobody_fills_the_rest_is_known(numbers: EventNumbers) -> None:
    numbers.take(0, stored(10))
    assert numbers.take(5, stored(15)) == 1
    numbers.take_again(4, stored(14))
    numbers.end_replay()
    assert (held(numbers), numbers.num_gaps) == ([14, 15], 1)


def test_without_replay_a_gap_forgets_all() -> None:
    numbers = EventNumbers(PageSet(), can_replay=False)
    assert numbers.begin() is None
    numbers.take(7, stored(1))
    numbers.take(8, stored(2))
    assert held(numbers) == [1, 2]
    assert numbers.take(10, stored(3)) is None
    assert held(numbers) == [3]


def test_numbers_that_begin_anew_are_another_engine(numbers: EventNumbers) -> None:
    for number in range(5):
        numbers.take(number, stored(number))
    numbers.take(0, stored(100))
    assert (held(numbers), numbers.num_gaps) == ([100], 0)


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", msgspec.msgpack.encode([1.0, [["Unknown"]]]), b"\x91" * 10_000]
)
def test_what_is_no_batch_is_counted(numbers: EventNumbers, payload: bytes) -> None:
    numbers.take(0, stored(1))
    numbers.take(1, payload)
    assert (held(numbers), numbers.num_bad) == ([], 1)
    numbers.take(2, stored(2))
    assert held(numbers) == [2]


@given(st.lists(st.sampled_from(["lose", "take", "again"]), max_size=40))
def test_whatever_is_lost_all_is_known_after_a_replay(course: list[str]) -> None:
    """As long as the engine has all messages still."""
    numbers = EventNumbers(PageSet(), can_replay=True)
    ask, sent = numbers.begin(), 0
    for what in [*course, "take", "again"]:
        if what != "again":
            answer = numbers.take(sent, stored(sent)) if what == "take" else None
            ask = answer if answer is not None else ask
            sent += 1
        elif ask is not None:
            for number in range(ask, sent):
                numbers.take_again(number, stored(number))
            numbers.end_replay()
            ask = None
    assert held(numbers) == list(range(sent))
    assert numbers.num_gaps == 0


def test_a_page_is_held_until_the_last_tier_has_lost_it(numbers: EventNumbers) -> None:
    numbers.take(0, stored(5))
    numbers.take(1, batch(BlockStored([5], None, [1, 2], 2, None, "CPU")))
    numbers.take(2, batch(BlockRemoved([5], "GPU")))
    assert held(numbers) == [5]
    numbers.take(3, batch(BlockRemoved([5], "\0" * 100)))
    assert held(numbers) == [5], "a tier that nobody has told of"
    numbers.take(4, batch(BlockRemoved([5], "CPU")))
    assert (held(numbers), numbers.num_bad) == ([], 0)
