"""Requests that want numbers: they end with their prompt, and by the same rules as all others."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.base.clock import ManualClock
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.output import RequestOutput
from sapwood.schema.pooling import Pooling
from sapwood.schema.request import Embed, Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import StepPlan, StepResult
from tests.tiers import examples

PAGE = 4
CONTEXT = 40
DECODER = {"decoder": "LlamaForCausalLM"}
KINDS: dict[str, dict[str, Any]] = {
    "encoder": {"method": "mean"},
    "last": {"method": "last", **DECODER},
    "mean": {"method": "mean", **DECODER},
}


def embed(request_id: str, prompt_ids: list[int]) -> Generate:
    return Generate(
        request_id=request_id,
        prompt_ids=prompt_ids,
        options=RequestOptions(sampling=SamplingParams(max_new_tokens=0), embed=Embed()),
    )


def tokens(request_id: str, prompt_ids: list[int]) -> Generate:
    return Generate(
        request_id=request_id,
        prompt_ids=prompt_ids,
        options=RequestOptions(sampling=SamplingParams(max_new_tokens=3)),
    )


class World:
    """A scheduler whose rank keeps the tokens that it is given, and answers with all of them."""

    def __init__(
        self,
        kind: str | None,
        *,
        num_pages: int = 40,
        chunk: int = 64,
        rows: int = 4,
        queued: int = 100,
        depth: int = 1,
    ) -> None:
        fields = {"task": "embed", "why": "", "size": 4} | KINDS.get(kind or "", {})
        self.pooling = None if kind is None else Pooling(**fields)
        tree = None if kind == "encoder" else PrefixTree(PAGE, EVICTION_POLICIES["lru"])
        self.ledger = Ledger(num_pages=num_pages, page_size=PAGE, tree=tree)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_running_requests=rows,
                max_queued_requests=queued,
                chunked_prefill_size=chunk,
                overlap_depth=depth,
            ),
            self.ledger,
            context_length=CONTEXT,
            vocab_size=100,
            eos_token_ids=[7],
            clock=ManualClock(),
            pooling=self.pooling,
        )
        self.depth = depth
        self.chunk = chunk
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.rows: dict[int, dict[int, int]] = {}
        self.kv: dict[tuple[int, int], int] = {}
        self.tables: dict[int, list[int]] = {}
        self.ends: dict[str, RequestOutput] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        assert sum(entry.num_new for entry in plan.scheduled) <= self.chunk
        values: dict[int, bytes] = {}
        for start in plan.starts:
            assert start.options.embed is not None
            self.rows[start.row], self.tables[start.row] = {}, []
        for index, entry in enumerate(plan.scheduled):
            table, own = self.tables[entry.row], self.rows[entry.row]
            table[entry.first_page :] = entry.pages
            for offset, token in enumerate(entry.token_ids):
                position = entry.position + offset
                own[position] = token
                self.kv[table[position // PAGE], position % PAGE] = token
            assert entry.num_output is None
            if entry.answers:
                length = entry.position + entry.num_new
                context = [self.kv[table[p // PAGE], p % PAGE] for p in range(length)]
                if not self.pooling.uses_prefixes:
                    # The hidden state of each token is needed, so each went through this row.
                    assert [own[position] for position in range(length)] == context
                if self.pooling.is_encoder:
                    assert entry.position == 0
                values[index] = bytes(context)
        return StepResult(step=plan.step, token_ids=[], values=values)

    def take(self, output: RequestOutput | None) -> None:
        if output is not None:
            assert output.request_id not in self.ends
            assert output.finish is not None
            self.ends[output.request_id] = output

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.ledger.check()
        if plan is not None:
            self.in_flight.append((plan, self.execute(plan)))
        if self.in_flight and (plan is None or len(self.in_flight) >= self.depth):
            for output in self.scheduler.update(*self.in_flight.popleft()):
                self.take(output)
            self.ledger.check()

    def run(self) -> None:
        for _ in range(2000):
            self.step()
            if not self.scheduler.has_open_requests and not self.in_flight:
                return
        raise AssertionError("a request never ended")

    def assert_nothing_is_held(self) -> None:
        assert self.scheduler.status().num_leased_pages == 0
        assert self.scheduler.flush_cache()
        assert self.ledger.num_free_pages == self.ledger.num_pages


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    shared = [draw(st.lists(st.integers(0, 9), max_size=20)) for _ in range(2)]
    kind = draw(st.sampled_from(sorted(KINDS)))
    return {
        "kind": kind,
        "num_pages": draw(st.integers(10, 30)),
        "chunk": CONTEXT if kind == "encoder" else draw(st.sampled_from([1, 3, 16, 64])),
        "rows": draw(st.integers(1, 5)),
        "depth": draw(st.sampled_from([1, 2, 3])),
        "requests": [
            {
                "prompt": draw(st.sampled_from(shared))
                + draw(st.lists(st.integers(0, 9), min_size=1, max_size=20)),
                "arrives": draw(st.integers(0, 12)),
                "aborted": draw(st.none() | st.integers(0, 20)),
            }
            for _ in range(draw(st.integers(1, 10)))
        ],
    }


@settings(max_examples=examples(500))
@given(scenarios())
def test_each_is_answered_once_and_by_its_own_prompt(scenario: dict[str, Any]) -> None:
    requests = {f"r{index}": one for index, one in enumerate(scenario.pop("requests"))}
    world = World(scenario.pop("kind"), **scenario)
    for turn in range(21):
        for request_id, one in requests.items():
            if one["arrives"] == turn:
                world.take(world.scheduler.add(embed(request_id, one["prompt"])))
            if one["aborted"] == turn:
                world.take(world.scheduler.abort(request_id))
        world.step()
    world.run()
    assert world.ends.keys() == requests.keys()
    for request_id, output in world.ends.items():
        if output.finish.kind == "length":
            assert output.values == bytes(requests[request_id]["prompt"])
        else:
            assert output.finish.kind == "abort"
            assert requests[request_id]["aborted"] is not None
            assert output.values == b""
        assert output.token_ids == []
    world.assert_nothing_is_held()


@pytest.mark.parametrize(("kind", "hit"), [("last", 8), ("mean", 0), ("encoder", 0)])
def test_only_last_token_pooling_hits_the_cache(kind: str, hit: int) -> None:
    world = World(kind)
    for request_id in ("a", "b"):
        world.take(world.scheduler.add(embed(request_id, list(range(10)))))
        world.run()
    assert world.ends["a"].num_cached_tokens == 0
    assert world.ends["b"].num_cached_tokens == hit


def test_an_encoders_prompt_waits_until_it_fits_into_a_step() -> None:
    world = World("encoder", chunk=40)
    for name in "abc":
        world.take(world.scheduler.add(embed(name, [1] * 30)))
    plan = world.scheduler.plan()
    assert [entry.num_new for entry in plan.scheduled] == [30]
    world.in_flight.append((plan, world.execute(plan)))
    world.run()
    assert world.ends.keys() == {"a", "b", "c"}


def test_a_text_may_fill_the_context() -> None:
    world = World("last")
    assert world.scheduler.add(embed("fits", [1] * CONTEXT)) is None
    refused = world.scheduler.add(embed("long", [1] * (CONTEXT + 1)))
    assert "accepts at most 40" in refused.finish.message


def test_a_message_that_the_model_cannot_answer_is_refused() -> None:
    for kind, request, says in (
        ("encoder", tokens("r", [1]), "generates no text"),
        (None, embed("r", [1]), "makes no embeddings"),
    ):
        world = World(kind)
        refused = world.scheduler.add(request)
        assert refused.finish.status == 400
        assert says in refused.finish.message
        assert not world.scheduler.has_open_requests


def test_the_queue_limit_holds() -> None:
    world = World("encoder", rows=1, queued=1)
    outputs = [world.scheduler.add(embed(str(i), [1])) for i in range(3)]
    refused = [output for output in outputs if output is not None]
    assert [output.finish.status for output in refused] == [503] * len(refused)
    assert refused
    world.run()
    world.assert_nothing_is_held()
