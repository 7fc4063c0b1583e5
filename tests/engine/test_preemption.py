"""Who gives way to whom; that the scheduler acts on it is tested in test_priorities."""

from __future__ import annotations

from sapwood.engine.admission import OutputReserve, Precedence
from sapwood.engine.preemption import Preemption
from sapwood.engine.request_state import RequestState
from sapwood.memory.ledger import Ledger
from sapwood.schema.request import Generate
from sapwood.schema.sampling import SamplingParams


def request(name: str, priority: int, arrival: int) -> RequestState:
    message = Generate(
        request_id=name,
        prompt_ids=[1, 2, 3],
        sampling=SamplingParams(max_new_tokens=4),
        priority=priority,
    )
    return RequestState(message, max_new_tokens=4, seed=0, arrival=arrival, arrival_s=0.0)


def preemption(
    running: list[RequestState], free_rows: list[int], threshold: int | None = 0
) -> Preemption:
    return Preemption(
        Precedence(takes_priorities=True, preemption_threshold=threshold),
        Ledger(num_pages=64, page_size=4, tree=None),
        OutputReserve(1.0),
        running=running,
        free_rows=free_rows,
        token_budget=100,
        urgency=lambda state: state.priority,
    )


def test_victims_are_less_urgent_and_the_youngest_of_the_least_urgent_goes_first() -> None:
    running = [request("a", 2, 0), request("b", 0, 1), request("c", 0, 2), request("d", 5, 3)]
    asked = preemption(running, [])
    names = [state.request_id for state in asked.victims([request("new", 5, 4)])]
    assert names == ["a", "b", "c"]
    assert not asked.victims([])
    assert not preemption(running, [], threshold=None).victims([request("new", 5, 4)])


def test_no_more_are_taken_back_than_needed() -> None:
    running = [request("a", 0, 0), request("b", 0, 1)]
    free_rows: list[int] = []
    asked = preemption(running, free_rows)

    def take_back(state: RequestState) -> None:
        running.remove(state)
        free_rows.append(0)

    new = request("new", 1, 2)
    assert asked.make_room(new, asked.victims([new]), take_back) == 1
    assert [state.request_id for state in running] == ["a"]
    assert asked.make_room(new, asked.victims([new]), take_back) == 0


def test_in_the_queue_the_youngest_of_the_least_urgent_gives_way_if_it_has_not_begun() -> None:
    waiting = [request("begun", -1, 0), request("old", 0, 1), request("young", 0, 2)]
    waiting[0].num_runs = 1
    asked = preemption([], [])
    displaced = asked.displaced(waiting, 1)
    assert displaced is not None
    assert displaced.request_id == "young"
    assert asked.displaced(waiting, 0) is None
    assert asked.displaced(waiting[:1], 9) is None
