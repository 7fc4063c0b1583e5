"""Slots of adapters: who gets one, who loses one, and in which order."""

from __future__ import annotations

import pytest

from sapwood.engine.adapters import (
    ADAPTER_PATIENCE_S,
    AdapterDesk,
    AdapterSlots,
    AdapterTurns,
)
from sapwood.engine.request_state import RequestState
from sapwood.schema.rank import Loaded
from sapwood.schema.request import Generate, LoadAdapter, RequestOptions


def slots_with(*names: str, at_once: int = 2, max_bytes: int = 3, policy: str = "lru"):
    slots = AdapterSlots(at_once, max_bytes, policy)
    for name in names:
        assert slots.add(name, 1) is None
    return slots


def use(slots: AdapterSlots, name: str) -> int:
    slot = slots.acquire(name)
    slots.release(name)
    return slot


def test_an_adapter_keeps_its_slot_until_another_needs_the_place():
    slots = slots_with("a", "b", "c", "d")
    first = [use(slots, name) for name in "abc"]
    assert len(set(first)) == 3
    assert slots.take_changes() == [(first[0], "a"), (first[1], "b"), (first[2], "c")]
    assert use(slots, "a") == first[0]
    assert slots.take_changes() == []
    assert use(slots, "d") == first[1], "b was unused longest"
    assert slots.take_changes() == [(first[1], ""), (first[1], "d")]
    assert slots.num_evictions == 1


def test_fifo_takes_the_oldest_whether_or_not_it_was_used_again():
    slots = slots_with("a", "b", "c", "d", policy="fifo")
    first = [use(slots, name) for name in "abca"]
    assert use(slots, "d") == first[0]


def test_a_running_adapter_never_loses_its_slot():
    slots = slots_with("a", "b", "c", max_bytes=1)
    slot = slots.acquire("a")
    assert not slots.has_room("b")
    assert slots.has_room("a")
    assert not slots.remove("a")
    assert slots.acquire("a") == slot
    slots.release("a")
    slots.release("a")
    assert slots.has_room("b")
    assert slots.acquire("b") == slot


def test_many_small_ones_fit_where_few_large_ones_do():
    slots = AdapterSlots(8, 8)
    for name, size in {"large": 8, "1": 2, "2": 2, "3": 2, "4": 2}.items():
        assert slots.add(name, size) is None
    for name in "1234":
        assert slots.has_room(name)
        slots.acquire(name)
    assert not slots.has_room("large")
    assert slots.bytes_used == 8


def test_slots_are_bounded_whatever_the_adapters_sizes():
    """Captured steps have tables of so many."""
    slots = AdapterSlots(2, 10_000)
    found = set()
    for index in range(100):
        slots.add(str(index), 1)
        found.add(slots.acquire(str(index)))
        slots.release(str(index))
    assert found == set(range(slots.max_slots))
    assert slots.num_evictions == 100 - slots.max_slots


def test_an_adapter_larger_than_all_slots_is_refused():
    why = AdapterSlots(2, 100).add("huge", 101)
    assert why is not None
    assert "--max-lora-rank" in why


def test_the_base_needs_no_slot():
    slots = AdapterSlots()
    assert slots.has_room("")
    assert slots.acquire("") == -1
    assert slots.why_refused("") is None
    assert "load it again" in (slots.why_refused("gone") or "")


def test_an_activated_adapter_begins_at_the_last_invocation():
    slots = AdapterSlots(2, 3)
    assert slots.add("on", 1, (7, 3, 7)) is None
    assert slots.add("zeros", 1, (0, 256)) is None
    assert slots.add("plain", 1) is None
    for prompt, start in [
        ([7, 3, 7], 0),
        ([1, 7, 3, 7, 3, 7, 9], 3),
        ([7, 3, 7, 1, 7, 3], 0),
        ([7, 3], None),
        ([1, 2, 3], None),
    ]:
        assert slots.begins_at("on", prompt) == start
        assert slots.begins_at("plain", prompt) == slots.begins_at("", prompt) == 0
    # Bytes of other tokens look like the invocation, between two tokens.
    assert slots.begins_at("zeros", [0, 256, 5, 0, 65536, 0]) == 0
    assert slots.begins_at("zeros", [256, 0, 0, 65536, 1]) is None
    assert slots.why_refused("on", has_ids=True) is None
    assert "input_embeds" in (slots.why_refused("on", has_ids=False) or "")
    assert slots.why_refused("plain", has_ids=False) is None


def state(name: str, arrival_s: float) -> RequestState:
    request = Generate(
        request_id=f"{name}-{arrival_s}", prompt_ids=[1], options=RequestOptions(adapter=name)
    )
    return RequestState(request, max_new_tokens=1, seed=0, arrival=0, arrival_s=arrival_s)


@pytest.mark.parametrize(("waited_s", "goes_first"), [(0.0, True), (ADAPTER_PATIENCE_S + 1, False)])
def test_who_was_passed_over_for_long_gets_the_next_slot(waited_s: float, goes_first: bool):
    slots = slots_with("a", "b", at_once=1)
    slots.acquire("a")
    turns = AdapterTurns(slots, waited_s)
    assert turns.passes_over(state("b", 0.0))
    assert turns.passes_over(state("a", 0.0)) != goes_first
    assert not turns.passes_over(state("", 0.0)), "the base runs in any case"


class Ranks:
    def __init__(self, *ends: Loaded) -> None:
        self.ends = list(ends)
        self.unloaded: list[str] = []

    def load(self, order: LoadAdapter) -> None:
        pass

    def finished(self) -> list[Loaded]:
        ends, self.ends = self.ends, []
        return ends

    def arrived(self) -> list[str]:
        return []

    def unload(self, adapter_id: str) -> None:
        self.unloaded.append(adapter_id)


def test_the_desk_tells_how_loads_ended_and_keeps_nothing_of_those_that_failed():
    ranks = Ranks(
        Loaded(call_id="1", adapter_id="good", num_bytes=3),
        Loaded(call_id="2", adapter_id="bad", failure="no such folder"),
        Loaded(call_id="3", adapter_id="huge", num_bytes=4),
    )
    desk = AdapterDesk(AdapterSlots(2, 3), ranks)
    for call_id in "123":
        desk.load(LoadAdapter(call_id=call_id, adapter_id="x", path="/x"))
    assert desk.is_loading
    told: list[tuple[str, bool, str]] = []
    desk.finished(lambda *message: told.append(message))
    assert [message[:2] for message in told] == [("1", True), ("2", False), ("3", False)]
    assert told[1][2] == "no such folder"
    assert ranks.unloaded == ["bad", "huge"]
    assert not desk.is_loading
    desk.slots.acquire("good")
    assert desk.unload("good") == "running requests have the adapter"
    desk.slots.release("good")
    assert desk.unload("good") is None
    assert ranks.unloaded[-1] == "good"


def test_a_request_begins_once_its_adapter_was_copied_beside_the_steps():
    slots = AdapterSlots(2, 2, overlaps=True)
    for name in ("a", "b", "c"):
        assert slots.add(name, 1) is None
    turns = AdapterTurns(slots, 0.0)
    assert turns.passes_over(state("a", 0.0))
    assert turns.passes_over(state("b", 0.0))
    assert not turns.passes_over(state("", 0.0)), "the base goes on meanwhile"
    assert slots.take_copies() == ["a", "b"]
    assert slots.take_changes() == []
    assert not slots.has_room("c"), "what is on its way keeps its place"
    slots.arrived("a")
    assert not turns.passes_over(state("a", 0.0))
    slot = slots.acquire("a")
    assert slots.take_changes() == [(slot, "a")]
    assert not slots.has_copies
    assert slots.remove("b"), "before it has arrived"
    slots.arrived("b")
    assert slots.has_room("c")
    assert slots.take_changes() == [(1 - slot, "")]
    assert turns.passes_over(state("c", 0.0))
    assert slots.take_copies() == ["c"]
