"""The loop over a simulated rank: messages in, exactly one terminal output per request out."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.clock import ManualClock
from sapwood.engine.loop import EngineLoop
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.output import (
    CacheFlushed,
    CallDone,
    EngineOutput,
    EngineStatus,
    RequestOutput,
    StepOutputs,
)
from sapwood.schema.request import (
    Abort,
    Drain,
    EngineInput,
    FlushCache,
    Generate,
    GetStatus,
    OrderWeights,
    RequestOptions,
)
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import StepHandle, StepPlan, StepResult
from sapwood.schema.weights import SetLimits
from tests.engine.simulation import DelayedExecutor, SimulatedRank, expected_outputs

PAGE = 4
DEPTHS = pytest.mark.parametrize("depth", [1, 2, 3])


class CountingExecutor:
    """Notes how many steps are in flight, and when each is waited for."""

    def __init__(self, rank: SimulatedRank) -> None:
        self._inner = DelayedExecutor(rank)
        self.in_flight = 0
        self.most_in_flight = 0
        self.fail_at: int | None = None

    def launch(self, plan: StepPlan) -> StepHandle:
        handle = self._inner.launch(plan)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return Handle(self, handle, plan.step)


class Handle:
    def __init__(self, executor: CountingExecutor, inner: StepHandle, step: int) -> None:
        self._executor, self._inner, self._step = executor, inner, step

    def result(self) -> StepResult:
        self._executor.in_flight -= 1
        if self._step == self._executor.fail_at:
            raise RuntimeError("the rank is gone")
        return self._inner.result()


class World:
    def __init__(self, depth: int, *, num_pages: int = 64, **config: object) -> None:
        settings = {
            "max_running_requests": 8,
            "max_queued_requests": 8,
            "chunked_prefill_size": 16,
            "overlap_depth": depth,
            **config,
        }
        self.clock = ManualClock()
        self.ledger = Ledger(
            num_pages=num_pages, page_size=PAGE, tree=PrefixTree(PAGE, least_recently_used)
        )
        scheduler = Scheduler(
            SchedulerConfig(**settings),
            self.ledger,
            context_length=200,
            vocab_size=100,
            eos_token_ids=set(),
            clock=self.clock,
        )
        self.executor = CountingExecutor(SimulatedRank(num_pages, PAGE))
        self.channel: QueueChannel[EngineInput] = QueueChannel()
        self.sent: list[EngineOutput] = []
        sender: CallbackSender[EngineOutput] = CallbackSender(self.sent.append)
        self.loop = EngineLoop(
            scheduler, self.executor, self.channel, sender, depth=depth, clock=self.clock
        )

    def ask(self, request_id: str, prompt: list[int], max_new_tokens: int = 6) -> None:
        sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        self.channel.send(
            Generate(
                request_id=request_id, prompt_ids=prompt, options=RequestOptions(sampling=sampling)
            )
        )

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.loop.turn(0.0)

    def of(self, request_id: str) -> list[RequestOutput]:
        return [
            output
            for message in self.sent
            if isinstance(message, StepOutputs)
            for output in message.outputs
            if output.request_id == request_id
        ]

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.of(request_id) for token in output.token_ids]

    def end(self, request_id: str) -> tuple[str, str | None]:
        """Kind and message of the one terminal output, which is the last."""
        outputs = self.of(request_id)
        finishes = [output.finish for output in outputs if output.finish is not None]
        assert len(finishes) == 1
        assert outputs[-1].finish is finishes[0]
        return finishes[0].kind, finishes[0].message

    def last(self, kind: type) -> object:
        return [message for message in self.sent if isinstance(message, kind)][-1]


@DEPTHS
def test_outputs_are_the_same_at_every_depth(depth: int) -> None:
    world = World(depth)
    prompts = {f"r{index}": [index] * (3 + 7 * index) for index in range(5)}
    for request_id, prompt in prompts.items():
        world.ask(request_id, prompt)
    world.turn(60)
    for request_id, prompt in prompts.items():
        assert world.tokens(request_id) == expected_outputs(prompt, 6, set())
        assert world.end(request_id) == ("length", None)
    assert world.executor.most_in_flight == depth
    assert world.executor.in_flight == 0


def test_one_message_per_step_carries_all_outputs() -> None:
    world = World(1)
    for name in "abc":
        world.ask(name, [1, 2, 3], max_new_tokens=2)
    world.turn(2)
    sizes = [len(message.outputs) for message in world.sent if isinstance(message, StepOutputs)]
    assert sizes == [3, 3]


@DEPTHS
def test_an_abort_gets_one_terminal_output_in_every_state(depth: int) -> None:
    world = World(2, max_running_requests=1)
    world.ask("running", [1] * 40, max_new_tokens=100)
    world.ask("waiting", [2] * 8)
    world.turn(5)
    for request_id in ("waiting", "running", "running", "never heard of"):
        world.channel.send(Abort(request_id))
    world.turn(depth + 1)
    assert world.end("running") == world.end("waiting") == ("abort", None)
    assert world.of("never heard of") == []
    world.channel.send(GetStatus("s"))
    world.turn()
    status = world.last(EngineStatus)
    assert isinstance(status, EngineStatus)
    assert (status.num_running, status.num_waiting, status.num_leased_pages) == (0, 0, 0)
    assert status.num_aborted == 2


def test_an_abort_that_overtakes_its_request_is_ignored() -> None:
    world = World(1)
    world.channel.send(Abort("a"))
    world.ask("a", [1, 2])
    world.turn(10)
    assert world.end("a") == ("length", None)


@DEPTHS
def test_an_id_can_be_used_again_in_the_turn_that_aborts_it(depth: int) -> None:
    world = World(depth)
    world.ask("a", [1] * 9, max_new_tokens=50)
    world.turn(4)
    world.sent.clear()
    world.channel.send(Abort("a"))
    world.ask("a", [2] * 9)
    world.turn(20)
    first, *others = world.of("a")
    assert first.finish is not None
    assert first.finish.kind == "abort"
    assert [token for output in others for token in output.token_ids] == expected_outputs(
        [2] * 9, 6, set()
    )


@DEPTHS
def test_the_cache_is_flushed_only_when_idle(depth: int) -> None:
    world = World(depth)
    world.ask("a", [1] * 20)
    world.channel.send(FlushCache("early"))
    world.turn(30)
    world.channel.send(FlushCache("late"))
    world.turn()
    early, late = [one for one in world.sent if isinstance(one, CacheFlushed)]
    assert (early.call_id, early.done) == ("early", False)
    assert "try again when idle" in early.message
    assert (late.call_id, late.done) == ("late", True)
    assert world.ledger.num_free_pages == world.ledger.num_pages


def test_status_answers_with_the_callers_id_while_busy() -> None:
    world = World(2)
    world.ask("a", [1] * 20)
    world.channel.send(GetStatus("mine"))
    world.turn()
    status = world.last(EngineStatus)
    assert isinstance(status, EngineStatus)
    assert (status.call_id, status.num_waiting) == ("mine", 1)


class TestDrain:
    @DEPTHS
    def test_open_requests_end_and_new_ones_are_refused(self, depth: int) -> None:
        world = World(depth)
        world.ask("open", [1] * 30)
        world.turn()
        world.channel.send(Drain(60.0))
        world.ask("late", [1, 2])
        world.loop.run()
        assert world.end("open") == ("length", None)
        assert world.tokens("open") == expected_outputs([1] * 30, 6, set())
        assert world.end("late") == ("error", "the server is shutting down")
        finish = world.of("late")[0].finish
        assert finish is not None
        assert finish.status == 503
        assert world.executor.in_flight == 0

    @DEPTHS
    def test_the_limit_aborts_what_is_left(self, depth: int) -> None:
        world = World(2, max_running_requests=1)
        world.ask("running", [1] * 30, max_new_tokens=100)
        world.ask("waiting", [2] * 30)
        world.turn(4)
        world.channel.send(Drain(5.0))
        world.turn(4)
        assert not any(output.finish for output in world.of("running"))
        world.clock.advance(5.0)
        world.loop.run()
        for request_id in ("running", "waiting"):
            assert world.end(request_id) == ("abort", "the server is shutting down")
        assert world.executor.in_flight == 0

    def test_an_idle_loop_ends_at_once(self) -> None:
        world = World(1)
        world.channel.send(Drain(60.0))
        world.loop.run()
        assert world.sent == []

    @pytest.mark.parametrize(("second_s", "ends_after_s"), [(60.0, 5.0), (1.0, 1.0)])
    def test_a_second_drain_hurries_but_does_not_put_off(
        self, second_s: float, ends_after_s: float
    ) -> None:
        world = World(1)
        world.ask("a", [1] * 10, max_new_tokens=150)
        world.turn()
        world.channel.send(Drain(5.0))
        world.channel.send(Drain(second_s))
        world.turn()
        world.clock.advance(ends_after_s - 0.01)
        world.turn()
        assert not any(output.finish for output in world.of("a"))
        world.clock.advance(0.01)
        world.turn()
        assert world.end("a")[0] == "abort"


def test_limits_change_while_requests_run() -> None:
    """Those that wait stay; the queue takes no more, and then more again."""
    world = World(2, max_running_requests=1)
    for name in ("runs", "waits", "waits too"):
        world.ask(name, [1, 2, 3], max_new_tokens=30)
    world.turn(3)
    for number, limit in enumerate([1, 8]):
        order = SetLimits(max_queued_requests=limit)
        world.channel.send(OrderWeights(call_id=str(number), order=order))
        world.ask(f"late {number}", [1, 2, 3])
        world.turn()
    done = [one for one in world.sent if isinstance(one, CallDone)]
    assert [(one.call_id, one.done) for one in done] == [("0", True), ("1", True)]
    (refused,) = world.of("late 0")
    assert refused.finish is not None
    assert refused.finish.status == 503
    world.turn(150)
    for name in ("runs", "waits", "waits too", "late 1"):
        assert world.of(name)[-1].finish is not None


def test_an_idle_loop_waits_for_messages_without_turning() -> None:
    world = World(1)
    received: list[float | None] = []
    receive: Callable[[float | None], list[EngineInput]] = world.channel.receive

    def counted(timeout_s: float | None) -> list[EngineInput]:
        received.append(timeout_s)
        return receive(timeout_s)

    world.channel.receive = counted  # type: ignore[method-assign]
    thread = threading.Thread(target=world.loop.run)
    thread.start()
    world.ask("a", [1, 2, 3], max_new_tokens=3)
    world.channel.send(Drain(60.0))
    thread.join(10)
    assert not thread.is_alive()
    assert world.end("a") == ("length", None)
    assert received[0] is None
    assert len(received) < 12


@DEPTHS
def test_what_a_step_raises_leaves_run(depth: int) -> None:
    world = World(depth)
    world.executor.fail_at = 3
    world.ask("a", [1, 2, 3], max_new_tokens=50)
    with pytest.raises(RuntimeError, match="the rank is gone"):
        world.loop.run()
    assert world.tokens("a") == expected_outputs([1, 2, 3], 3, set())
