"""Requests whose grammars are compiled meanwhile: they wait, and nobody else does."""

from __future__ import annotations

from collections import deque

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.clock import ManualClock
from sapwood.engine.loop import EngineLoop
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema import grammar as grammars
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.output import Finish
from sapwood.schema.rank import CompileGrammar, GrammarAnswer, RankMessage
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import StepPlan, StepResult
from tests.engine.simulation import DelayedExecutor, SimulatedRank, expected_outputs
from tests.tiers import examples


class SlowGrammars:
    """Two ranks. A grammar is ready on a rank when that is told; what begins with "bad" is refused
    by the second rank. Messages go as bytes, as they would between processes."""

    num_ranks = 2

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.slower: set[str] = set()
        self.open: dict[int, str] = {}
        self.unanswered: list[set[int]] = [set(), set()]

    def send(self, message: RankMessage) -> None:
        message = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=RankMessage)
        if isinstance(message, CompileGrammar):
            assert message.id not in self.open
            assert message.grammar.text not in self.open.values(), "each grammar is ordered once"
            self.open[message.id] = message.grammar.text
            for unanswered in self.unanswered:
                unanswered.add(message.id)
        else:
            del self.open[message.id]

    def answers(self) -> list[GrammarAnswer]:
        found = [
            self._answer(order, rank)
            for rank, unanswered in enumerate(self.unanswered)
            for order in sorted(unanswered)
            # A rank may answer after the release, which was on its way.
            if self.open.get(order) in {None, *(self.slower if rank else self.ready)}
        ]
        for answer in found:
            self.unanswered[answer.rank].remove(answer.id)
        encoded = [msgspec.msgpack.encode(answer) for answer in found]
        return [msgspec.msgpack.decode(answer, type=GrammarAnswer) for answer in encoded]

    def _answer(self, order: int, rank: int) -> GrammarAnswer:
        if rank == 1 and self.open.get(order, "").startswith("bad"):
            refusal = Finish(
                kind="error", message="it is bad", status=400, error_type="BadRequestError"
            )
            return GrammarAnswer(id=order, rank=rank, refusal=refusal)
        return GrammarAnswer(id=order, rank=rank)

    def compile(self, text: str) -> None:
        """Both ranks are ready now."""
        self.ready.add(text)
        self.slower.add(text)


class Rank(SimulatedRank):
    """Remembers which rows hold the state of a grammar; a token may bring forced ones."""

    def __init__(self, num_pages: int, page_size: int, *, jumps: bool = False) -> None:
        super().__init__(num_pages, page_size)
        self.constrained: set[int] = set()
        self.jumps = jumps

    def execute(self, plan: StepPlan) -> StepResult:
        for row in plan.ends:
            self.constrained.remove(row)
        for start in plan.starts:
            assert start.row not in self.constrained, "its last request's state is still there"
            if start.options.sampling.grammar is not None:
                self.constrained.add(start.row)
        result = super().execute(plan)
        if not self.jumps:
            return result
        sampled = iter(result.token_ids)
        forced = {}
        for index, entry in enumerate(plan.scheduled):
            if entry.num_output is None:
                continue
            token = next(sampled)[-1]
            if entry.row in self.constrained and token % 3 == 0:
                forced[index] = [token + 1, token + 2]
        return StepResult(step=plan.step, token_ids=result.token_ids, forced=forced)


def make(
    *,
    num_pages: int = 64,
    rows: int = 8,
    depth: int = 1,
    jumps: bool = False,
    clock: ManualClock | None = None,
    request_timeout: float = 0.0,
    queue_timeout: float = 0.0,
):
    ledger = Ledger(num_pages=num_pages, page_size=4, tree=PrefixTree(4, EVICTION_POLICIES["lru"]))
    slow = SlowGrammars()
    scheduler = Scheduler(
        SchedulerConfig(
            max_running_requests=rows,
            max_queued_requests=100,
            chunked_prefill_size=16,
            overlap_depth=depth,
            request_timeout=request_timeout,
            queue_timeout=queue_timeout,
        ),
        ledger,
        context_length=60,
        vocab_size=100,
        eos_token_ids={7},
        clock=clock or ManualClock(),
        grammars=slow,
    )
    rank = Rank(num_pages, 4, jumps=jumps)
    return scheduler, slow, rank, ledger


def request(request_id: str, regex: str | None = None, max_new: int = 6) -> Generate:
    grammar = None if regex is None else grammars.regex(regex)
    return Generate(
        request_id=request_id,
        prompt_ids=[1, 2, 3, len(request_id), ord(request_id[-1]) % 50],
        options=RequestOptions(sampling=SamplingParams(max_new_tokens=max_new, grammar=grammar)),
    )


def run(scheduler, rank, outputs, turns: int = 100) -> None:
    for _ in range(turns):
        outputs += scheduler.end_overdue()
        plan = scheduler.plan()
        if plan is None:
            return
        outputs += scheduler.update(plan, rank.execute(plan))


def test_one_whose_grammar_is_compiled_waits_and_others_do_not():
    scheduler, slow, rank, _ = make()
    outputs = []
    scheduler.add(request("slow", "a"))
    scheduler.add(request("quick"))
    run(scheduler, rank, outputs)
    assert {one.request_id for one in outputs} == {"quick"}
    assert scheduler.has_open_requests
    assert not scheduler.has_work
    assert scheduler.status().num_waiting == 1
    slow.compile("a")
    run(scheduler, rank, outputs)
    assert outputs[-1].request_id == "slow"
    assert outputs[-1].finish is not None
    assert not scheduler.has_open_requests
    assert not scheduler.has_work
    assert rank.constrained == set()
    assert slow.open == {}


def test_a_grammar_that_cannot_be_used_ends_the_request():
    scheduler, slow, _, _ = make()
    slow.compile("bad")
    assert scheduler.add(request("r", "bad")) is None
    [output] = scheduler.end_overdue()
    assert output.finish is not None
    assert (output.finish.kind, output.finish.status) == ("error", 400)
    assert output.finish.message == "it is bad"
    assert not scheduler.has_open_requests
    assert slow.open == {}


def test_a_request_waits_for_the_slowest_rank():
    scheduler, slow, rank, _ = make()
    outputs = []
    scheduler.add(request("r", "a"))
    slow.ready.add("a")
    run(scheduler, rank, outputs)
    assert outputs == []
    assert not scheduler.has_work
    slow.slower.add("a")
    run(scheduler, rank, outputs)
    assert outputs[-1].finish is not None
    assert slow.open == {}


def test_a_grammar_is_ordered_once_and_again_after_its_release():
    scheduler, slow, rank, _ = make()
    outputs = []
    for name in ("r1", "r2"):
        scheduler.add(request(name, "a"))
    assert slow.open == {0: "a"}
    slow.compile("a")
    run(scheduler, rank, outputs, turns=2)
    scheduler.add(request("r3", "a"))
    assert scheduler.has_work, "the third need not wait"
    run(scheduler, rank, outputs)
    assert slow.open == {}
    scheduler.add(request("r4", "a"))
    assert slow.open == {1: "a"}
    run(scheduler, rank, outputs)
    assert not scheduler.has_open_requests


def test_without_a_backend_a_grammar_is_refused():
    ledger = Ledger(num_pages=8, page_size=4, tree=None)
    scheduler = Scheduler(
        SchedulerConfig(
            max_running_requests=1, max_queued_requests=1, chunked_prefill_size=16, overlap_depth=1
        ),
        ledger,
        context_length=30,
        vocab_size=100,
        eos_token_ids={7},
        clock=ManualClock(),
    )
    output = scheduler.add(request("r", "a"))
    assert output is not None
    assert output.finish is not None
    assert output.finish.status == 400
    assert "regex" in (output.finish.message or "")
    assert "--grammar-backend none" in (output.finish.message or "")


def test_forced_tokens_are_put_out_until_one_ends_the_request():
    scheduler, slow, _, _ = make()
    slow.compile("a")
    scheduler.add(request("r", "a", max_new=5))
    scheduler.end_overdue()
    plan = scheduler.plan()
    assert plan is not None
    outputs = scheduler.update(plan, StepResult(step=0, token_ids=[[9]], forced={0: [10, 11]}))
    assert outputs[0].token_ids == [9, 10, 11]
    plan = scheduler.plan()
    assert plan is not None
    [entry] = plan.scheduled
    assert (entry.token_ids, entry.position, entry.num_output) == ([9, 10, 11], 5, 3)
    outputs = scheduler.update(plan, StepResult(step=1, token_ids=[[8]], forced={0: [7, 12]}))
    assert outputs[0].token_ids == [8, 7]
    assert outputs[0].finish is not None
    assert (outputs[0].finish.kind, outputs[0].finish.matched) == ("stop", 7)


def test_the_loop_does_not_spin_while_it_waits_for_a_grammar():
    scheduler, slow, rank, _ = make()
    inbox: QueueChannel = QueueChannel()
    sent: list = []
    loop = EngineLoop(
        scheduler,
        DelayedExecutor(rank),
        inbox,
        CallbackSender(sent.append),
        depth=1,
        clock=ManualClock(),
    )
    inbox.send(request("r", "a"))
    loop.turn(0.0)
    assert 0 < (loop._patience_s() or 0) < 0.1
    slow.compile("a")
    for _ in range(20):
        loop.turn(0.0)
    assert not scheduler.has_open_requests
    assert loop._patience_s() is None
    assert rank.constrained == set()


@st.composite
def scenarios(draw):
    return {
        "pages": draw(st.integers(8, 30)),
        "rows": draw(st.integers(1, 5)),
        "depth": draw(st.sampled_from([1, 2, 3])),
        "requests": [
            {
                "regex": draw(st.sampled_from([None, "a", "b", "bad"])),
                "max_new": draw(st.integers(0, 12)),
                "arrives": draw(st.integers(0, 15)),
                "aborted": draw(st.none() | st.integers(0, 30)),
            }
            for _ in range(draw(st.integers(1, 10)))
        ],
        # A turn takes a second.
        "timeouts": draw(
            st.fixed_dictionaries(
                {name: st.just(0.0) | st.floats(1.0, 30.0) for name in ("request", "queue")}
            )
        ),
        "ready": {name: draw(st.integers(0, 25)) for name in ("a", "b", "bad")},
        "slower": {name: draw(st.integers(0, 25)) for name in ("a", "b", "bad")},
    }


@settings(max_examples=examples(500))
@given(scenarios())
def test_nothing_stays_behind(scenario) -> None:
    jumps = scenario["depth"] == 1
    clock = ManualClock()
    scheduler, slow, rank, ledger = make(
        num_pages=scenario["pages"],
        rows=scenario["rows"],
        depth=scenario["depth"],
        jumps=jumps,
        clock=clock,
        request_timeout=scenario["timeouts"]["request"],
        queue_timeout=scenario["timeouts"]["queue"],
    )
    executor = DelayedExecutor(rank)
    in_flight: deque = deque()
    finishes: dict[str, str] = {}
    late: set[str] = set()
    tokens: dict[str, list[int]] = {}

    def take(outputs) -> None:
        for one in outputs:
            assert one.request_id not in finishes
            tokens.setdefault(one.request_id, []).extend(one.token_ids)
            if one.finish is not None:
                finishes[one.request_id] = one.finish.kind
                if one.finish.status in (503, 504):
                    late.add(one.request_id)

    for turn in range(2000):
        clock.advance(1.0)
        slow.ready |= {name for name, when in scenario["ready"].items() if when <= turn}
        slow.slower |= {name for name, when in scenario["slower"].items() if when <= turn}
        for index, one in enumerate(scenario["requests"]):
            if one["arrives"] == turn:
                refused = scheduler.add(request(f"r{index}", one["regex"], one["max_new"]))
                take([] if refused is None else [refused])
            if one["aborted"] == turn:
                ended = scheduler.abort(f"r{index}")
                take([] if ended is None else [ended])
        take(scheduler.end_overdue())
        plan = scheduler.plan()
        if plan is not None:
            in_flight.append((plan, executor.launch(plan)))
        if in_flight and (plan is None or len(in_flight) >= scenario["depth"]):
            done, handle = in_flight.popleft()
            take(scheduler.update(done, handle.result()))
        ledger.check()
        if turn > 40 and not scheduler.has_work and not in_flight:
            break
    assert not scheduler.has_open_requests
    assert rank.constrained == set(), "the state of a grammar is left"
    assert slow.open == {}, "a grammar is still said to be in use"
    assert scheduler.status().num_leased_pages == 0
    for index, one in enumerate(scenario["requests"]):
        name = f"r{index}"
        kind = finishes[name]
        if name in late:
            assert any(scenario["timeouts"].values())
        elif one["regex"] == "bad":
            assert kind in ("error", "abort")
        elif kind != "abort" and not jumps:
            expected = expected_outputs(request(name).prompt_ids, one["max_new"], {7})
            assert tokens[name] == expected
