"""Who gives way to whom; that the scheduler acts on it is tested in test_priorities."""

from __future__ import annotations

from sapwood.engine.admission import OutputReserve, Precedence
from sapwood.engine.preemption import Preemption
from sapwood.engine.request_state import RequestState
from sapwood.memory.eviction import least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams

PAGE = 4


def request(
    name: str, priority: int, arrival: int, *, prompt: list[int] | None = None, max_new: int = 4
) -> RequestState:
    message = Generate(
        request_id=name,
        prompt_ids=prompt or [1, 2, 3],
        options=RequestOptions(sampling=SamplingParams(max_new_tokens=max_new), priority=priority),
    )
    return RequestState(message, max_new_tokens=max_new, seed=0, arrival=arrival, arrival_s=0.0)


class Running:
    """Requests that decode, each with its lease, and whom it would take back for others."""

    def __init__(self, *states: RequestState, num_pages: int = 64, threshold: int | None = 0):
        tree = PrefixTree(PAGE, least_recently_used)
        self.ledger = Ledger(num_pages=num_pages, page_size=PAGE, tree=tree)
        self.states: list[RequestState] = []
        self.free_rows: list[int] = []
        self.asked = Preemption(
            Precedence(takes_priorities=True, preemption_threshold=threshold),
            self.ledger,
            OutputReserve(1.0),
            running=self.states,
            free_rows=self.free_rows,
            token_budget=100,
            urgency=lambda state: state.priority,
        )
        for state in states:
            self.run(state)

    def run(self, state: RequestState) -> None:
        """Its prompt is computed and its first output token is known."""
        state.lease, _ = self.ledger.lease(state.namespace, state.matchable_key())
        assert self.ledger.reserve(state.lease, state.num_tokens)
        self.ledger.commit(state.lease, state.key())
        state.num_computed_tokens = state.num_tokens
        state.output_ids.append(0)
        self.states.append(state)

    def take_back(self, state: RequestState) -> None:
        self.states.remove(state)
        self.free_rows.append(0)
        assert state.lease is not None
        self.ledger.release(state.lease)

    def make_room(self, new: RequestState) -> list[str]:
        """Whom it takes back."""
        before = [state.request_id for state in self.states]
        num_taken = self.asked.make_room(new, self.asked.victims([new]), self.take_back)
        left = [state.request_id for state in self.states]
        assert num_taken == len(before) - len(left)
        self.ledger.check()
        return [name for name in before if name not in left]


def test_victims_are_less_urgent_and_the_youngest_of_the_least_urgent_goes_first() -> None:
    running = [request("a", 2, 0), request("b", 0, 1), request("c", 0, 2), request("d", 5, 3)]
    asked = Running(*running).asked
    names = [state.request_id for state in asked.victims([request("new", 5, 4)])]
    assert names == ["a", "b", "c"]
    assert not asked.victims([])
    never = Running(*[request("a", 2, 0)], threshold=None).asked
    assert not never.victims([request("new", 5, 4)])


def test_no_more_are_taken_back_than_needed() -> None:
    running = Running(request("a", 0, 0), request("b", 0, 1))
    new = request("new", 1, 2)
    assert running.make_room(new) == ["b"]
    assert running.make_room(new) == []


def test_nobody_is_taken_back_for_a_request_that_would_not_fit_even_then() -> None:
    running = Running(
        request("urgent", 9, 0, prompt=list(range(40))),
        request("low", 0, 1, prompt=list(range(50, 62))),
        num_pages=16,
    )
    assert running.make_room(request("new", 5, 2, prompt=list(range(60, 92)))) == []
    assert running.make_room(request("small", 5, 3)) == ["low"]


def test_pages_that_others_go_on_using_are_not_counted_as_room() -> None:
    shared = list(range(40))
    running = Running(
        request("urgent", 9, 0, prompt=[*shared, 50]),
        request("low", 0, 1, prompt=[*shared, 60]),
        num_pages=16,
    )
    assert running.make_room(request("new", 5, 2, prompt=list(range(60, 80)))) == []


def test_a_victim_is_spared_if_another_one_makes_room_enough() -> None:
    running = Running(
        request("large", 1, 0, prompt=list(range(24))),
        request("small", 0, 1, prompt=list(range(30, 36))),
        num_pages=12,
    )
    running.free_rows.append(0)
    assert running.make_room(request("new", 5, 2, prompt=list(range(60, 84)))) == ["large"]


def test_with_nobody_else_running_nothing_is_kept_back() -> None:
    """As in admission, where a large request could otherwise never begin."""
    running = Running(request("low", 0, 0), request("lower", -1, 1), num_pages=12)
    new = request("new", 5, 2, prompt=list(range(60, 90)), max_new=1000)
    assert running.make_room(new) == ["low", "lower"]


def test_what_running_requests_take_in_this_step_is_not_offered_to_another() -> None:
    """Eight whose next token begins a page take the eight pages that a victim would leave."""
    eight = [request(f"r{k}", 9, k, prompt=[10 * k + 9, 2, 3, 4], max_new=1) for k in range(8)]
    low = request("low", 0, 9, prompt=list(range(200, 232)), max_new=1)
    running = Running(*eight, low, num_pages=17)
    for state in eight:
        state.max_new_tokens = 2
    assert running.make_room(request("new", 5, 10)) == []


def test_requests_are_retracted_only_if_that_brings_the_pages_that_are_missing() -> None:
    shared = list(range(20))
    needs, twin, other, lone = (
        request(name, 0, k, prompt=prompt)
        for k, (name, prompt) in enumerate(
            [
                ("needs", shared),
                ("twin", shared),
                ("other", list(range(30, 34))),
                ("lone", list(range(40, 44))),
            ]
        )
    )
    running = Running(needs, twin, other, lone, num_pages=7)
    assert running.ledger.num_available_pages == 0

    def retracted(num_tokens: int, victims: list[RequestState]) -> list[str] | None:
        states = running.asked.to_retract(needs, num_tokens, victims)
        return None if states is None else [state.request_id for state in states]

    assert retracted(24, [other, lone]) == ["lone"]
    assert retracted(28, [other, lone]) == ["lone", "other"]
    assert retracted(24, [lone, twin]) == ["lone"], "the twin's pages stay in use"
    assert retracted(24, [twin]) is None
    assert retracted(40, [twin, other, lone]) is None


def test_in_the_queue_the_youngest_of_the_least_urgent_gives_way_if_it_has_not_begun() -> None:
    waiting = [request("begun", -1, 0), request("old", 0, 1), request("young", 0, 2)]
    waiting[0].num_runs = 1
    asked = Running().asked
    displaced = asked.displaced(waiting, 1)
    assert displaced is not None
    assert displaced.request_id == "young"
    assert asked.displaced(waiting, 0) is None
    assert asked.displaced(waiting[:1], 9) is None
