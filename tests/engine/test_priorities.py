"""Priorities, preemption, displacement from a full queue, aging, deadlines and the delayer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.base.clock import ManualClock
from sapwood.base.errors import ConfigError
from sapwood.engine.admission import Precedence, PrefillDelayer
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.config.scheduler import POLICIES, SchedulerConfig
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from tests.engine.simulation import SimulatedRank, expected_outputs
from tests.tiers import examples


class Engine:
    """A scheduler over a simulated rank; each turn is one step and one second."""

    def __init__(self, *, num_pages: int = 256, **options: Any) -> None:
        self.clock = ManualClock()
        self.ledger = Ledger(
            num_pages=num_pages, page_size=4, tree=PrefixTree(4, EVICTION_POLICIES["lru"])
        )
        settings = {
            "max_running_requests": 1,
            "max_queued_requests": 100,
            "chunked_prefill_size": 64,
            "schedule_policy": "fcfs",
            "overlap_depth": 1,
            "enable_priority_scheduling": True,
            **options,
        }
        self.scheduler = Scheduler(
            SchedulerConfig(**settings),
            self.ledger,
            context_length=1024,
            vocab_size=100,
            eos_token_ids=(),
            clock=self.clock,
        )
        self.rank = SimulatedRank(num_pages, 4)
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.prompts: dict[str, Generate] = {}
        self.begun: list[str] = []
        self.turn = 0

    def add(
        self,
        request_id: str,
        priority: int | None = None,
        *,
        prompt: list[int] | None = None,
        max_new: int = 8,
        routing_key: str = "",
    ) -> None:
        request = Generate(
            request_id=request_id,
            prompt_ids=prompt or [len(self.prompts) % 50, 1, 2],
            options=RequestOptions(
                sampling=SamplingParams(max_new_tokens=max_new, temperature=0.0),
                priority=priority,
                routing_key=routing_key,
            ),
        )
        self.prompts[request_id] = request
        self._take([self.scheduler.add(request)])

    def run(self, turns: int = 1) -> None:
        for _ in range(turns):
            self._take(self.scheduler.end_overdue())
            plan = self.scheduler.plan()
            if plan is not None:
                self._note_starts(plan.starts)
                self._take(self.scheduler.update(plan, self.rank.execute(plan)))
            self.ledger.check()
            self.turn += 1
            self.clock.advance(1.0)

    def _note_starts(self, starts: list[Any]) -> None:
        for start in starts:
            (request_id,) = [
                one.request_id
                for one in self.prompts.values()
                if one.prompt_ids == start.prompt_ids and one.request_id not in self.begun
            ] or [""]
            if request_id:
                self.begun.append(request_id)

    def _take(self, outputs: list[RequestOutput | None]) -> None:
        for output in outputs:
            if output is not None:
                self.outputs.setdefault(output.request_id, []).append(output)

    def tokens(self, request_id: str) -> list[int]:
        return [token for one in self.outputs.get(request_id, []) for token in one.token_ids]

    def finish(self, request_id: str) -> Any:
        outputs = self.outputs.get(request_id)
        return outputs[-1].finish if outputs else None

    def check_all_correct(self) -> None:
        for request_id, request in self.prompts.items():
            expected = expected_outputs(
                request.prompt_ids, request.options.sampling.max_new_tokens or 0, set()
            )
            assert self.tokens(request_id) == expected, request_id


def test_a_more_urgent_request_takes_the_place_of_a_running_one_which_keeps_its_output() -> None:
    engine = Engine(priority_scheduling_preemption_threshold=10)
    engine.add("low", 0, max_new=20)
    engine.run(5)
    assert len(engine.tokens("low")) == 5
    engine.add("high", 11, max_new=3)
    engine.run(3)
    assert engine.finish("high").kind == "length"
    assert len(engine.tokens("low")) == 5
    status = engine.scheduler.status()
    assert (status.num_preemptions, status.num_retractions) == (1, 0)
    engine.run(30)
    engine.check_all_correct()
    assert engine.scheduler.status().num_leased_pages == 0


def test_the_difference_must_exceed_the_threshold() -> None:
    engine = Engine(priority_scheduling_preemption_threshold=10)
    engine.add("low", 0, max_new=20)
    engine.run(5)
    engine.add("high", 10, max_new=3)
    engine.run(3)
    assert engine.finish("high") is None
    assert engine.scheduler.status().num_preemptions == 0


def test_no_more_are_preempted_than_needed_and_the_least_urgent_first() -> None:
    engine = Engine(max_running_requests=3, priority_scheduling_preemption_threshold=0)
    for name, priority in (("a", 2), ("b", 1), ("c", 1)):
        engine.add(name, priority, max_new=50)
        engine.run()
    engine.add("urgent", 5, max_new=50)
    engine.run()
    before = {name: len(engine.tokens(name)) for name in "abc"}
    engine.run()
    assert engine.scheduler.status().num_preemptions == 1
    grown = {name for name in "abc" if len(engine.tokens(name)) > before[name]}
    assert grown == {"a", "b"}, "c was the youngest of the least urgent"


def test_pages_are_taken_back_as_well_as_rows() -> None:
    engine = Engine(
        num_pages=12, max_running_requests=8, priority_scheduling_preemption_threshold=0
    )
    engine.add("low", 0, prompt=list(range(30)), max_new=16)
    engine.run(2)
    engine.add("high", 1, prompt=list(range(10, 40)), max_new=8)
    engine.run(8)
    assert engine.finish("high").kind == "length"
    assert engine.scheduler.status().num_preemptions == 1
    engine.run(30)
    engine.check_all_correct()


def test_a_long_prompt_in_computation_gives_way_too() -> None:
    engine = Engine(
        max_running_requests=4,
        chunked_prefill_size=8,
        priority_scheduling_preemption_threshold=0,
    )
    engine.add("long", 0, prompt=[k % 50 for k in range(400)], max_new=2)
    engine.run(2)
    engine.add("high", 1, max_new=1)
    engine.run(1)
    assert engine.finish("high").kind == "length"
    engine.run(70)
    engine.check_all_correct()


def test_low_values_first_turns_the_order_round() -> None:
    engine = Engine(schedule_low_priority_values_first=True)
    engine.add("running", 0, max_new=2)
    engine.run()
    for name, priority in (("late", 3), ("soon", -3), ("mid", None)):
        engine.add(name, priority, max_new=1)
    engine.run(10)
    assert engine.begun == ["running", "soon", "mid", "late"]


def test_a_priority_that_the_server_does_not_take_is_refused_by_name() -> None:
    engine = Engine(enable_priority_scheduling=False)
    engine.add("plain", None)
    engine.add("same as default", 0)
    engine.add("asked", 3)
    assert engine.finish("asked").status == 400
    assert "--enable-priority-scheduling" in engine.finish("asked").message
    engine.add("lower", -1)
    engine.add("later")
    engine.run(40)
    assert {engine.finish(name).kind for name in ("same as default", "lower")} == {"length"}
    assert engine.begun == ["plain", "same as default", "later", "lower"]
    assert engine.scheduler.status().num_preemptions == 0


def test_requests_without_a_priority_have_the_default() -> None:
    engine = Engine(default_priority_value=7)
    engine.add("running", None, max_new=2)
    engine.run()
    engine.add("five", 5, max_new=1)
    engine.add("none", None, max_new=1)
    engine.run(10)
    assert engine.begun == ["running", "none", "five"]


@pytest.mark.parametrize(
    "options",
    [
        {"default_priority_value": 3},
        {"schedule_low_priority_values_first": True},
        {"priority_scheduling_preemption_threshold": 2},
    ],
)
def test_options_that_would_do_nothing_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--enable-priority-scheduling"):
        SchedulerConfig(**options)
    SchedulerConfig(**options, enable_priority_scheduling=True)
    SchedulerConfig(**options, schedule_policy="priority")


def test_a_full_queue_refuses_unless_a_less_urgent_request_waits_in_it() -> None:
    engine = Engine(max_queued_requests=2)
    engine.add("running", 0, max_new=50)
    engine.run()
    engine.add("a", 1)
    engine.add("b", 1)
    engine.add("equal", 1)
    assert engine.finish("equal").status == 503
    assert engine.finish("equal").message == "The request queue is full."
    engine.add("urgent", 2)
    engine.run()
    assert engine.finish("urgent") is None
    assert engine.finish("a") is None
    assert engine.finish("b").status == 503, "the youngest of the least urgent had to go"
    assert "more urgent" in engine.finish("b").message


def test_what_was_begun_is_not_displaced() -> None:
    engine = Engine(max_queued_requests=1, priority_scheduling_preemption_threshold=0)
    engine.add("low", 0, max_new=20)
    engine.run(2)
    engine.add("high", 1, max_new=20)
    engine.run(2)
    assert engine.scheduler.status().num_preemptions == 1
    engine.add("higher", 1)
    assert engine.finish("higher").status == 503
    engine.run(60)
    assert engine.finish("low").kind == "length"


def test_requests_with_a_routing_key_that_runs_often_come_first() -> None:
    engine = Engine(schedule_policy="routing-key", max_running_requests=3)
    for name, key in (("r1", "b"), ("r2", "b"), ("r3", "a")):
        engine.add(name, routing_key=key, max_new=30 if name != "r3" else 3)
    engine.run(2)
    for name, key in (("none", ""), ("a", "a"), ("b", "b")):
        engine.add(name, routing_key=key, max_new=30)
    engine.run(2)
    assert engine.begun == ["r1", "r2", "r3", "b"]


# ---- fairness ------------------------------------------------------------------------------


@st.composite
def floods(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "policy": draw(st.sampled_from(POLICIES)),
        "aging": draw(st.sampled_from([1.0, 3.0, 7.5])),
        "threshold": draw(st.sampled_from([0, 2, 10])),
        "rows": draw(st.integers(1, 3)),
        "arrivals": draw(
            st.lists(
                st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 6)),
                min_size=2,
                max_size=40,
            )
        ),
    }


@settings(max_examples=examples(500))
@given(floods())
def test_a_request_is_overtaken_only_by_what_arrives_soon_after_it(flood: dict[str, Any]) -> None:
    """One of a priority larger by d overtakes it only within (d + 1) aging intervals."""
    engine = Engine(
        schedule_policy=flood["policy"],
        max_running_requests=flood["rows"],
        priority_aging_interval=flood["aging"],
        priority_scheduling_preemption_threshold=flood["threshold"],
        in_batch_prefix_threshold=-1,
    )
    arrived: dict[str, tuple[float, int]] = {}
    for index, (gap, priority, max_new) in enumerate(flood["arrivals"]):
        engine.run(gap)
        name = f"r{index}"
        arrived[name] = (engine.clock.now_s(), priority)
        engine.add(name, priority, prompt=[index, 1, 2, 3], max_new=max_new)
    engine.run(400)
    engine.check_all_correct()
    begun = {name: place for place, name in enumerate(engine.begun)}
    assert begun.keys() == arrived.keys()
    for one, (at_s, priority) in arrived.items():
        for other, (other_at_s, other_priority) in arrived.items():
            head_start_s = max(other_priority - priority + 1, 0) * flood["aging"]
            if other_at_s >= at_s + head_start_s and other_at_s > at_s:
                assert begun[one] < begun[other]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_endless_flood_of_urgent_requests_starves_nobody(policy: str) -> None:
    engine = Engine(
        schedule_policy=policy,
        priority_aging_interval=5.0,
        priority_scheduling_preemption_threshold=0,
    )
    engine.add("low", 0, max_new=12, prompt=[49, 9, 9])
    for turn in range(200):
        if turn % 2 == 0:
            engine.add(f"high{turn}", 3, max_new=2, prompt=[turn % 45, turn // 45, 1])
        engine.run()
        if engine.finish("low") is not None:
            break
    assert engine.finish("low").kind == "length"


def test_without_aging_the_same_flood_does() -> None:
    engine = Engine(priority_scheduling_preemption_threshold=0)
    engine.add("low", 0, max_new=12, prompt=[49, 9, 9])
    for turn in range(200):
        if turn % 2 == 0:
            engine.add(f"high{turn}", 3, max_new=2, prompt=[turn % 45, turn // 45, 1])
        engine.run()
    assert engine.finish("low") is None


@given(
    st.integers(-5, 5), st.integers(-5, 5), st.floats(0, 100), st.floats(0, 100), st.floats(0, 500)
)
def test_two_requests_never_preempt_each_other_in_turn(
    first: int, second: int, first_at_s: float, second_at_s: float, later_s: float
) -> None:
    order = Precedence(takes_priorities=True, preemption_threshold=0, aging_interval_s=10.0)
    now_s = max(first_at_s, second_at_s)

    def urgencies(at_s: float) -> tuple[int, int]:
        return order.urgency(first, at_s - first_at_s), order.urgency(second, at_s - second_at_s)

    one, other = urgencies(now_s)
    if order.may_preempt(one, other):
        one, other = urgencies(now_s + later_s)
        assert not order.may_preempt(other, one)


# ---- limits and the delayer ----------------------------------------------------------------


def test_a_request_that_waits_too_long_ends_with_503() -> None:
    engine = Engine(queue_timeout=5.0)
    engine.add("running", max_new=30)
    engine.run()
    engine.add("waiting")
    engine.run(4)
    assert engine.finish("waiting") is None
    engine.run(3)
    assert engine.finish("waiting").status == 503
    assert "--queue-timeout" in engine.finish("waiting").message
    engine.run(30)
    assert engine.finish("running").kind == "length"
    assert engine.scheduler.status().num_timed_out == 1


def test_the_queue_timeout_does_not_end_what_was_begun() -> None:
    engine = Engine(queue_timeout=5.0, priority_scheduling_preemption_threshold=0)
    engine.add("low", 0, max_new=20)
    engine.run(2)
    engine.add("high", 1, max_new=20)
    engine.run(60)
    assert engine.finish("low").kind == engine.finish("high").kind == "length"


def test_a_request_that_takes_too_long_ends_with_504_wherever_it_is() -> None:
    engine = Engine(request_timeout=10.0)
    engine.add("running", max_new=50)
    engine.add("waiting", max_new=50)
    engine.run(12)
    for name in ("running", "waiting"):
        assert engine.finish(name).status == 504
        assert "--request-timeout" in engine.finish(name).message
    status = engine.scheduler.status()
    assert (status.num_running, status.num_waiting, status.num_leased_pages) == (0, 0, 0)
    assert not engine.scheduler.has_open_requests


def test_a_prompt_over_the_limit_is_refused() -> None:
    engine = Engine(max_prompt_tokens=4)
    engine.add("fits", prompt=[1, 2, 3, 4], max_new=1)
    engine.add("long", prompt=[1, 2, 3, 4, 5], max_new=1)
    assert engine.finish("long").status == 400
    assert "--max-prompt-tokens" in engine.finish("long").message
    engine.run(3)
    assert engine.finish("fits").kind == "length"


def test_the_delayer_collects_prompts_while_others_decode() -> None:
    engine = Engine(
        max_running_requests=8, enable_prefill_delayer=True, prefill_delayer_max_delay_passes=5
    )
    engine.add("first", max_new=40)
    engine.run(2)
    engine.add("second")
    engine.run(3)
    engine.add("third")
    engine.run(2)
    assert engine.begun == ["first"]
    engine.run(1)
    assert engine.begun == ["first", "second", "third"]


def test_the_delayer_lets_in_what_fills_a_step_or_meets_nobody() -> None:
    delayer = PrefillDelayer(max_delay_passes=3, token_usage_low_watermark=0.2)
    assert not delayer.holds_back(num_running=0, fills_a_step=False, token_usage=0.9)
    assert not delayer.holds_back(num_running=1, fills_a_step=True, token_usage=0.9)
    assert not delayer.holds_back(num_running=1, fills_a_step=False, token_usage=0.1)
    held = [
        delayer.holds_back(num_running=1, fills_a_step=False, token_usage=0.9) for _ in range(5)
    ]
    assert held == [True, True, True, False, True]
