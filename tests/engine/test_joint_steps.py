"""Engines that compute steps together: whoever has requests gets on, and nobody waits for ever."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.clock import MonotonicClock
from sapwood.engine.joint_steps import JointSteps
from sapwood.engine.loop import EngineLoop
from sapwood.engine.scheduler import Scheduler
from sapwood.executor.launch import OverlappedExecutor, SerialExecutor
from sapwood.memory.eviction import least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.output import EngineOutput, StepOutputs
from sapwood.schema.request import (
    Drain,
    EngineEnds,
    EngineInput,
    Generate,
    RequestOptions,
    StepBegun,
)
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import StepPlan, StepResult
from tests.engine.simulation import SimulatedRank, expected_outputs

PAGE, NUM_PAGES = 4, 32


class Engines:
    """Loops in threads, whose steps end only once every engine has begun them."""

    def __init__(self, size: int, depth: int) -> None:
        self._all_here = threading.Barrier(size, timeout=60.0)
        self._channels: list[QueueChannel[EngineInput]] = [QueueChannel() for _ in range(size)]
        self._answered = threading.Condition()
        self.tokens: dict[str, list[int]] = {}
        self._ended: set[str] = set()
        self.num_idle = [0] * size
        self.num_steps = [0] * size
        self._loops = [self._loop(number, depth) for number in range(size)]
        self._pool = ThreadPoolExecutor(size)
        self._runs = [self._pool.submit(loop.run) for loop in self._loops]

    def ask(self, number: int, request_id: str, prompt: list[int], num_tokens: int) -> None:
        sampling = SamplingParams(max_new_tokens=num_tokens, temperature=0.0)
        options = RequestOptions(sampling=sampling)
        self._channels[number].send(
            Generate(request_id=request_id, prompt_ids=prompt, options=options)
        )

    def wait_for(self, request_ids: set[str]) -> None:
        with self._answered:
            assert self._answered.wait_for(lambda: request_ids <= self._ended, 60.0)

    def drain(self) -> None:
        """End all loops; the error of one of them, if there is one."""
        for channel in self._channels:
            channel.send(Drain(timeout_s=60.0))
        for run in self._runs:
            run.result(60.0)
        for executor in self._executors:
            executor.close()
        self._pool.shutdown()

    def _loop(self, number: int, depth: int) -> EngineLoop:
        rank = SimulatedRank(NUM_PAGES, PAGE)

        def execute(plan: StepPlan) -> StepResult:
            if plan.is_idle:
                self.num_idle[number] += 1
                self._all_here.wait()
                return StepResult(step=plan.step, token_ids=[])
            if plan.scheduled:
                self.num_steps[number] += 1
                self._all_here.wait()
            return rank.execute(plan)

        def tell(message: StepBegun | EngineEnds) -> None:
            for other, channel in enumerate(self._channels):
                if other != number:
                    channel.send(message)

        scheduler = Scheduler(
            SchedulerConfig(
                max_running_requests=4,
                max_queued_requests=64,
                chunked_prefill_size=16,
                overlap_depth=depth,
            ),
            Ledger(num_pages=NUM_PAGES, page_size=PAGE, tree=PrefixTree(PAGE, least_recently_used)),
            context_length=100,
            vocab_size=100,
            eos_token_ids=set(),
            clock=MonotonicClock(),
        )
        executor = SerialExecutor(execute) if depth == 1 else OverlappedExecutor(execute)
        self._executors = [*getattr(self, "_executors", []), executor]
        sender: CallbackSender[EngineOutput] = CallbackSender(self._take)
        return EngineLoop(
            scheduler,
            executor,
            self._channels[number],
            sender,
            depth=depth,
            clock=MonotonicClock(),
            joint=JointSteps(tell, len(self._channels) - 1),
        )

    def _take(self, message: EngineOutput) -> None:
        if not isinstance(message, StepOutputs):
            return
        with self._answered:
            for output in message.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish is not None:
                    self._ended.add(output.request_id)
            self._answered.notify_all()


@pytest.mark.parametrize(("size", "depth"), [(2, 1), (2, 2), (3, 2)])
def test_uneven_arrivals(size: int, depth: int) -> None:
    """Requests in several bursts, between which all engines sleep."""
    draw = random.Random(size + 10 * depth)
    engines = Engines(size, depth)
    expected: dict[str, list[int]] = {}
    for burst in range(6):
        only = draw.choice([None, 0, size - 1])  # often all requests are one engine's
        for index in range(draw.randrange(1, 12)):
            name, length = f"{burst}-{index}", draw.randrange(1, 40)
            prompt = [draw.randrange(100) for _ in range(length)]
            num_tokens = draw.randrange(1, 12)
            expected[name] = expected_outputs(prompt, num_tokens, set())
            number = draw.randrange(size) if only is None else only
            engines.ask(number, name, prompt, num_tokens)
        engines.wait_for(set(expected))
    engines.drain()
    assert engines.tokens == expected
    total = {own + idle for own, idle in zip(engines.num_steps, engines.num_idle, strict=True)}
    assert len(total) == 1, "every engine takes part in every step"
    assert any(engines.num_idle), "sometimes one has nothing to do"


def test_a_drain_waits_for_the_others_requests() -> None:
    engines = Engines(2, 1)
    prompt = [1, 2, 3]
    engines.ask(0, "long", prompt, 50)
    engines.drain()
    assert engines.tokens["long"] == expected_outputs(prompt, 50, set())


def told_by(act: Callable[[JointSteps], None]) -> list[StepBegun | EngineEnds]:
    told: list[StepBegun | EngineEnds] = []
    act(JointSteps(told.append, 1))
    return told


def test_a_step_is_told_once_and_only_by_who_begins_it() -> None:
    def act(steps: JointSteps) -> None:
        steps.begin()
        steps.on_begun(StepBegun(2))
        assert steps.is_awaited
        steps.begin()
        assert not steps.is_awaited
        steps.begin()
        steps.on_begun(StepBegun(3))  # the other one has begun at the same time
        assert not steps.is_awaited

    assert told_by(act) == [StepBegun(1), StepBegun(3)]


def test_an_engine_ends_with_the_last_one() -> None:
    def act(steps: JointSteps) -> None:
        assert not steps.may_end()
        steps.on_begun(StepBegun(1))
        steps.on_ends(EngineEnds())
        assert not steps.may_end(), "the other one waits for it in its last step"
        steps.begin()
        assert steps.may_end()

    assert told_by(act) == [EngineEnds()]
