"""Log probabilities through the scheduler: each once and in place, whatever the schedule."""

from __future__ import annotations

import random
import struct
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.base.clock import ManualClock
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.output import Finish, RequestOutput
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import EntryLogprobs, StepPlan, StepResult
from tests.engine.simulation import SimulatedRank, expected_outputs
from tests.tiers import examples

PAGE = 4


def packed(values: list[int]) -> TokenLogprobs:
    return TokenLogprobs(tokens=struct.pack(f"<{len(values)}f", *values))


class ScoringRank(SimulatedRank):
    """The "log probability" of a token is its id after position * 100, negative."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages, PAGE)
        self._prompts: dict[int, tuple[list[int], LogprobOptions | None]] = {}
        self.scored: list[tuple[int, int]] = []
        """(row, position) of every prompt token whose logits were asked for."""

    def execute(self, plan: StepPlan) -> StepResult:
        for start in plan.starts:
            self._prompts[start.row] = (start.prompt_ids, start.options.logprobs)
        result = super().execute(plan)
        sampled = iter(result.token_ids)
        logprobs: dict[int, EntryLogprobs] = {}
        for index, entry in enumerate(plan.scheduled):
            prompt, options = self._prompts[entry.row]
            token = next(sampled)[0] if entry.num_output is not None else None
            if options is None:
                assert entry.num_scored == 0
                continue
            after = range(entry.first_scored + 1, entry.first_scored + 1 + entry.num_scored)
            if entry.num_scored:
                assert entry.position <= entry.first_scored
                assert after[-1] <= entry.position + entry.num_new
            self.scored += [(entry.row, position - 1) for position in after]
            position = entry.position + entry.num_new
            output = None if token is None else packed([-100 * position - token])
            scores = packed([-100 * p - prompt[p] for p in after]) if after else None
            logprobs[index] = EntryLogprobs(output=output, prompt=scores)
        return StepResult(step=plan.step, token_ids=result.token_ids, logprobs=logprobs)


class World:
    def __init__(self, *, num_pages: int = 64, depth: int = 1, **config: Any) -> None:
        settings = {
            "max_running_requests": 8,
            "max_queued_requests": 64,
            "chunked_prefill_size": 16,
            "overlap_depth": depth,
            **config,
        }
        self.ledger = Ledger(
            num_pages=num_pages, page_size=PAGE, tree=PrefixTree(PAGE, least_recently_used)
        )
        self.scheduler = Scheduler(
            SchedulerConfig(**settings),
            self.ledger,
            context_length=num_pages * PAGE,
            vocab_size=100,
            eos_token_ids=set(),
            clock=ManualClock(),
        )
        self.rank = ScoringRank(num_pages)
        self.depth = depth
        self.in_flight: deque[StepPlan] = deque()
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(
        self, name: str, prompt: list[int], logprobs: LogprobOptions | None, num_tokens: int = 4
    ) -> None:
        sampling = SamplingParams(max_new_tokens=num_tokens, temperature=0.0)
        request = Generate(
            request_id=name,
            prompt_ids=prompt,
            options=RequestOptions(sampling=sampling, logprobs=logprobs),
        )
        assert self.scheduler.add(request) is None

    def turn(self) -> None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.in_flight.append(plan)
        if self.in_flight and (plan is None or len(self.in_flight) >= self.depth):
            done = self.in_flight.popleft()
            self.take(self.scheduler.update(done, self.rank.execute(done)))

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def run(self) -> None:
        turns = 0
        while self.scheduler.has_open_requests or self.in_flight:
            self.turn()
            turns += 1
            assert turns < 5000
        self.ledger.check()

    def check(self, name: str, prompt: list[int], start: int | None, num_tokens: int) -> None:
        outputs = self.outputs[name]
        token_ids = [token for one in outputs for token in one.token_ids]
        assert token_ids == expected_outputs(prompt, num_tokens, set())
        parts = [one.logprobs for one in outputs if one.logprobs is not None]
        values = [value for part in parts for value in part.of_tokens()]
        first = len(prompt)
        assert values == [-100.0 * (first + i) - token for i, token in enumerate(token_ids)]
        told = [one.prompt_logprobs for one in outputs if one.prompt_logprobs is not None]
        positions = [] if start is None else range(start + 1, len(prompt))
        if not positions:
            assert told == []
            return
        [scores] = told
        assert list(scores.of_tokens()) == [-100.0 * p - prompt[p] for p in positions]
        assert outputs[0].prompt_logprobs is not None


def test_a_prompt_comes_in_chunks_and_is_told_with_the_first_token() -> None:
    world = World(chunked_prefill_size=5)
    prompt = [index * 7 % 50 for index in range(23)]
    world.add("a", prompt, LogprobOptions(prompt_start=0))
    world.run()
    world.check("a", prompt, 0, 4)
    assert [position for _, position in world.rank.scored] == list(range(22))


@pytest.mark.parametrize("start", [None, 0, 3, 8, 9, 21, 22])
def test_a_prefix_hit_ends_where_the_logits_begin_to_be_wanted(start: int | None) -> None:
    world = World()
    prompt = [index * 7 % 50 for index in range(23)]
    world.add("before", prompt, None)
    world.run()
    world.add("a", prompt, LogprobOptions(prompt_start=start))
    world.run()
    world.check("a", prompt, start, 4)
    covered = 22 if start is None else min(start, 22)
    assert world.outputs["a"][0].num_cached_tokens == covered // PAGE * PAGE


def test_a_prompt_alone_is_scored_without_an_output() -> None:
    world = World()
    world.add("a", [5, 6, 7], LogprobOptions(prompt_start=0), num_tokens=0)
    world.run()
    [output] = world.outputs["a"]
    assert output.finish == Finish(kind="length")
    assert output.prompt_logprobs == packed([-106, -207])


def test_an_abort_in_the_middle_of_a_prompt_tells_nothing() -> None:
    world = World(chunked_prefill_size=4)
    world.add("a", list(range(20)), LogprobOptions(prompt_start=0))
    world.turn()
    output = world.scheduler.abort("a")
    assert output is not None
    assert output.prompt_logprobs is None
    world.run()
    assert world.scheduler.status().num_leased_pages == 0


def test_a_failure_ends_its_request_and_no_other() -> None:
    world = World()
    for name in "ab":
        world.add(name, [1, 2, 3], None)
    plan = world.scheduler.plan()
    assert plan is not None
    result = world.rank.execute(plan)
    [first, _] = result.token_ids
    failed = StepResult(step=result.step, token_ids=[first, []], failures={1: "it broke"})
    world.take(world.scheduler.update(plan, failed))
    [output] = world.outputs["b"]
    assert output.token_ids == []
    assert output.finish == Finish(
        kind="error", message="it broke", status=400, error_type="BadRequestError"
    )
    world.run()
    assert [token for one in world.outputs["a"] for token in one.token_ids] == expected_outputs(
        [1, 2, 3], 4, set()
    )
    assert world.scheduler.status().num_leased_pages == 0


@settings(max_examples=examples(500))
@given(
    seed=st.integers(0, 2**32),
    depth=st.integers(1, 3),
    chunk=st.sampled_from([1, 3, 8, 64]),
    num_pages=st.integers(20, 40),
)
def test_no_schedule_loses_or_repeats_one(
    seed: int, depth: int, chunk: int, num_pages: int
) -> None:
    rng = random.Random(seed)
    world = World(
        num_pages=num_pages,
        depth=depth,
        chunked_prefill_size=chunk,
        schedule_conservativeness=0.0,
        in_batch_prefix_threshold=rng.choice([-1, 4]),
    )
    stem = [rng.randrange(50) for _ in range(20)]
    asked: dict[str, tuple[list[int], int | None, int]] = {}
    for index in range(8):
        prompt = stem[: rng.randrange(21)] + [rng.randrange(50) for _ in range(rng.randint(1, 15))]
        start = rng.choice([None, 0, rng.randrange(len(prompt))])
        asked[f"r{index}"] = (prompt, start, rng.randint(1, 12))
        world.add(f"r{index}", prompt, LogprobOptions(prompt_start=start), asked[f"r{index}"][2])
        for _ in range(rng.randrange(4)):
            world.turn()
    world.run()
    for name, (prompt, start, num_tokens) in asked.items():
        world.check(name, prompt, start, num_tokens)


def test_retractions_happen_in_these_schedules() -> None:
    world = World(num_pages=12, depth=2, chunked_prefill_size=4, schedule_conservativeness=0.0)
    prompts = {f"r{index}": [index + 10 * i % 40 for i in range(13)] for index in range(4)}
    for name, prompt in prompts.items():
        world.add(name, prompt, LogprobOptions(prompt_start=2), 16)
    world.run()
    assert world.scheduler.status().num_retractions > 0
    for name, prompt in prompts.items():
        world.check(name, prompt, 2, 16)
