"""Hidden states, and prompts that are vectors: right whatever the schedule, and apart from the
prefix cache."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.base.clock import ManualClock
from sapwood.engine.per_token import PerToken
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import ScheduledTokens, StepPlan, StepResult
from tests.engine.simulation import SimulatedRank, expected_outputs
from tests.tiers import examples

PAGE = 4


def vector_of(token: int) -> bytes:
    """What stands for that token where a prompt is vectors; of one number."""
    return struct.pack("<f", token)


class Rank(SimulatedRank):
    """The "hidden state" of a token is its position and its id."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages, PAGE)
        self._vectors: dict[int, list[int]] = {}
        self.num_hidden = 0

    def execute(self, plan: StepPlan) -> StepResult:
        for start in plan.starts:
            self._vectors[start.row] = [int(struct.unpack("<f", v)[0]) for v in start.input_embeds]
            assert not (start.input_embeds and start.prompt_ids)
        entries = [self._with_vectors(entry) for entry in plan.scheduled]
        # One that samples its own last token has no id in the plan.
        last = [self._rows[e.row].last_token if e.row in self._rows else -1 for e in entries]
        result = super().execute(msgspec.structs.replace(plan, scheduled=entries))
        hidden = {
            index: [
                struct.pack("<2f", entry.position + i, token)
                for i, token in enumerate(entry.token_ids or [last[index]])
            ][-entry.num_hidden :]
            for index, entry in enumerate(entries)
            if entry.num_hidden
        }
        self.num_hidden += sum(map(len, hidden.values()))
        return msgspec.structs.replace(result, hidden_states=hidden)

    def _with_vectors(self, entry: ScheduledTokens) -> ScheduledTokens:
        vectors = self._vectors[entry.row][entry.position :][: entry.num_new]
        if not vectors:
            return entry
        assert set(entry.token_ids[: len(vectors)]) == {0}
        ids = vectors + entry.token_ids[len(vectors) :]
        return msgspec.structs.replace(entry, token_ids=ids)


@dataclass
class Asked:
    prompt: list[int]
    num_tokens: int
    is_vectors: bool = False
    wants_hidden: bool = False


@dataclass
class World:
    num_pages: int = 64
    depth: int = 1
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {
            "max_running_requests": 8,
            "max_queued_requests": 64,
            "chunked_prefill_size": 16,
            "overlap_depth": self.depth,
            "in_batch_prefix_threshold": 4,
            **self.config,
        }
        self.ledger = Ledger(
            num_pages=self.num_pages, page_size=PAGE, tree=PrefixTree(PAGE, least_recently_used)
        )
        self.scheduler = Scheduler(
            SchedulerConfig(**options),
            self.ledger,
            context_length=self.num_pages * PAGE,
            vocab_size=100,
            eos_token_ids=set(),
            clock=ManualClock(),
            hidden_size=1,
        )
        self.rank = Rank(self.num_pages)
        self.outputs: dict[str, list[RequestOutput]] = {}
        self._in_flight: deque[StepPlan] = deque()

    def add(self, name: str, asked: Asked) -> None:
        prompt = asked.prompt
        request = Generate(
            request_id=name,
            prompt_ids=[0] * len(prompt) if asked.is_vectors else prompt,
            input_embeds=[vector_of(token) for token in prompt] if asked.is_vectors else [],
            options=RequestOptions(
                return_hidden_states=asked.wants_hidden,
                sampling=SamplingParams(max_new_tokens=asked.num_tokens, temperature=0.0),
            ),
        )
        assert self.scheduler.add(request) is None

    def turn(self) -> None:
        plan = self.scheduler.plan()
        if plan is not None:
            self._in_flight.append(plan)
        if self._in_flight and (plan is None or len(self._in_flight) >= self.depth):
            done = self._in_flight.popleft()
            for output in self.scheduler.update(done, self.rank.execute(done)):
                self.outputs.setdefault(output.request_id, []).append(output)

    def run(self) -> None:
        for _ in range(5000):
            if not self.scheduler.has_open_requests and not self._in_flight:
                self.ledger.check()
                return
            self.turn()
        raise AssertionError("it does not end")

    def check(self, name: str, asked: Asked) -> None:
        outputs = self.outputs[name]
        ids = [token for output in outputs for token in output.token_ids]
        assert ids == expected_outputs(asked.prompt, asked.num_tokens, set())
        known = [*asked.prompt, *ids[:-1]]
        found = [struct.unpack("<2f", one) for output in outputs for one in output.hidden_states]
        assert found == (list(enumerate(known)) if asked.wants_hidden else [])
        if asked.is_vectors or asked.wants_hidden:
            assert outputs[-1].num_cached_tokens == 0


@st.composite
def requests(draw: st.DrawFn) -> list[Asked]:
    """Few prompts, so that they share prefixes; zeros are what vectors have for ids."""
    common = [[0] * 24, draw(st.lists(st.integers(0, 49), min_size=24, max_size=24))]
    return [
        Asked(
            draw(st.sampled_from(common))[: draw(st.integers(1, 24))],
            draw(st.integers(0, 12)),
            is_vectors=draw(st.booleans()),
            wants_hidden=draw(st.booleans()),
        )
        for _ in range(draw(st.integers(1, 6)))
    ]


@settings(max_examples=examples(500))
@given(requests(), st.integers(1, 3), st.integers(10, 30), st.integers(1, 40), st.data())
def test_each_token_tells_once_whatever_the_schedule(
    asked: list[Asked], depth: int, num_pages: int, chunk: int, data: st.DataObject
) -> None:
    world = World(num_pages, depth, {"chunked_prefill_size": chunk})
    for number, one in enumerate(asked):
        world.add(str(number), one)
        for _ in range(data.draw(st.integers(0, 3))):
            world.turn()
    world.run()
    for number, one in enumerate(asked):
        world.check(str(number), one)


def test_retractions_tell_nothing_twice() -> None:
    world = World(num_pages=8, depth=2, config={"schedule_conservativeness": 0.0})
    asked = [Asked([i, 5, 6, 7], 20, wants_hidden=True, is_vectors=i == 1) for i in range(3)]
    for number, one in enumerate(asked):
        world.add(str(number), one)
    world.run()
    assert world.scheduler.status().num_retractions > 0
    for number, one in enumerate(asked):
        world.check(str(number), one)


def test_vectors_leave_no_prefix_and_those_who_want_hidden_states_do() -> None:
    world = World()
    world.add("vectors", Asked([9] * 12, 4, is_vectors=True))
    world.run()
    assert world.scheduler.status().num_cached_pages == 0
    world.add("hidden", Asked([9] * 12, 4, wants_hidden=True))
    world.run()
    world.add("plain", Asked([9] * 12, 4))
    world.run()
    assert world.outputs["plain"][-1].num_cached_tokens == 8
    for name, asked in (
        ("vectors", Asked([9] * 12, 4, is_vectors=True)),
        ("hidden", Asked([9] * 12, 4, wants_hidden=True)),
        ("plain", Asked([9] * 12, 4)),
    ):
        world.check(name, asked)


def test_samples_of_one_prompt_do_not_wait_for_each_others_prefix() -> None:
    world = World(config={"chunked_prefill_size": 64})
    for name in "ab":
        world.add(name, Asked(list(range(16)), 2, wants_hidden=True))
    plan = world.scheduler.plan()
    assert plan is not None
    assert [entry.num_hidden for entry in plan.scheduled] == [16, 16]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_request_without_an_output_tells_of_its_whole_prompt(depth: int) -> None:
    """Its last chunk may still be on its way when the one before it is done."""
    world = World(depth=depth, config={"chunked_prefill_size": 1})
    world.add("a", Asked([3, 1, 4], 0, wants_hidden=True))
    world.run()
    world.check("a", Asked([3, 1, 4], 0, wants_hidden=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_embeds": [b"1234", b"12345678"]}, "vectors of 1 numbers"),
        ({"input_embeds": [b"1234"]}, "a vector for each token"),
        (
            {"options": RequestOptions(logprobs=LogprobOptions(prompt_start=0))},
            "log probabilities",
        ),
    ],
)
def test_vectors_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    fields = {"input_embeds": [b"1234"] * 2, "options": RequestOptions(), **change}
    asked = Generate(request_id="a", prompt_ids=[0, 0], **fields)
    refused = World().scheduler.add(asked)
    assert refused is not None
    assert refused.finish is not None
    assert refused.finish.status == 400
    assert says in (refused.finish.message or "")


def test_tokens_that_are_computed_again_bring_nothing_new() -> None:
    states = PerToken()
    assert states.num_wanted(0, 3) == 3
    states.take(0, [b"0", b"1", b"2"])
    assert states.to_tell() == [b"0", b"1", b"2"]
    assert states.num_wanted(0, 2) == 0
    assert states.num_wanted(1, 4) == 2
    states.take(1, [b"1", b"2", b"3"])
    assert states.to_tell() == [b"3"]
    assert states.to_tell() == []
