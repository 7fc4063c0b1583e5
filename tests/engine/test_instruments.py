import json
import logging

import msgspec
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.clock import ManualClock
from sapwood.engine.instruments import Instruments, StatusLog
from sapwood.engine.loop import EngineLoop
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.observe.profiling import ProfileSession
from sapwood.observe.tracing import EngineSpans, Tracing
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.output import CallDone, EngineOutput, EngineStatus
from sapwood.schema.request import (
    Drain,
    EngineInput,
    FreezeGc,
    Generate,
    GetStatus,
    RequestOptions,
    SlowDown,
    StartProfile,
    StopProfile,
    TraceContext,
)
from sapwood.schema.sampling import SamplingParams
from tests.engine.simulation import DelayedExecutor, SimulatedRank

PAGE = 4
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class NotingHeartbeat:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.is_resting = True

    def beat(self, doing: str) -> None:
        self.notes.append("beat")
        self.is_resting = False

    def rest(self) -> None:
        self.notes.append("rest")
        self.is_resting = True


class NotingRecorder:
    def __init__(self) -> None:
        self.fails = False

    def start(self, order) -> None:
        if self.fails:
            raise OSError("another profiler runs")

    def stop(self, path) -> None:
        path.write_text("trace")


class Lines:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)

    def close(self) -> None:
        self.lines.append("closed")


class World:
    """A loop over a simulated rank with these instruments."""

    def __init__(self, depth: int = 1, **instruments) -> None:
        config = SchedulerConfig(
            max_running_requests=4,
            max_queued_requests=4,
            chunked_prefill_size=16,
            overlap_depth=depth,
        )
        clock = ManualClock()
        ledger = Ledger(num_pages=32, page_size=PAGE, tree=PrefixTree(PAGE, least_recently_used))
        self.scheduler = Scheduler(
            config, ledger, context_length=100, vocab_size=100, eos_token_ids=(), clock=clock
        )
        self.channel: QueueChannel[EngineInput] = QueueChannel()
        self.sent: list[EngineOutput] = []
        self.instruments = Instruments(**instruments)
        self.loop = EngineLoop(
            self.scheduler,
            DelayedExecutor(SimulatedRank(32, PAGE)),
            self.channel,
            CallbackSender(self.sent.append),
            depth=depth,
            clock=clock,
            instruments=self.instruments,
        )

    def ask(
        self, request_id: str, num_tokens: int = 5, new: int = 3, *, trace=None, **options
    ) -> None:
        sampling = SamplingParams(max_new_tokens=new)
        self.channel.send(
            Generate(
                request_id=request_id,
                prompt_ids=list(range(1, num_tokens + 1)),
                options=RequestOptions(sampling=sampling, **options),
                trace=trace,
            )
        )

    def run(self) -> None:
        self.channel.send(Drain(1000.0))
        self.loop.run()

    def answers(self, kind: type) -> list:
        return [message for message in self.sent if isinstance(message, kind)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_heart_beats_with_steps_and_rests_when_idle(depth):
    heartbeat = NotingHeartbeat()
    world = World(depth, heartbeat=heartbeat)
    world.loop.turn(0.0)
    assert heartbeat.notes == ["rest"]
    world.ask("a", new=3)
    world.loop.turn(0.0)
    assert not heartbeat.is_resting
    while world.scheduler.has_open_requests or not heartbeat.is_resting:
        world.loop.turn(0.0)
    # One as the request came, one per step.
    assert heartbeat.notes.count("beat") == 1 + world.scheduler.status().num_steps


def test_a_step_that_does_not_end_gives_no_beat():
    heartbeat = NotingHeartbeat()
    world = World(depth=2, heartbeat=heartbeat)
    world.ask("a", num_tokens=40)
    world.loop.turn(0.0)
    num_beats = heartbeat.notes.count("beat")
    assert (num_beats, heartbeat.is_resting) == (1, False)


def test_a_status_tells_the_process_and_the_kinds_of_tokens():
    world = World()
    world.ask("a", num_tokens=9, new=4, routing_key="k")
    world.ask("b", num_tokens=9, new=4, routing_key="k")
    world.channel.send(GetStatus("1"))
    world.run()
    [early] = world.answers(EngineStatus)
    assert early.routing_key_all_counts == (2,)
    assert early.cpu_seconds > 0
    assert early.resident_bytes > 2**20
    late = world.scheduler.status()
    # The second one hits what the first one computed.
    assert late.num_prefill_tokens + late.num_cached_tokens == 18
    assert late.num_computed_tokens - late.num_prefill_tokens == 6
    assert (late.routing_key_all_counts, late.routing_key_running_counts) == ((), ())


def test_a_profile_is_asked_for_by_messages(tmp_path):
    world = World(profile=ProfileSession(NotingRecorder()))
    world.channel.send(StopProfile("0"))
    world.channel.send(StartProfile(call_id="1", folder=str(tmp_path), name="p", num_steps=2))
    world.channel.send(StartProfile(call_id="2", folder=str(tmp_path), name="q"))
    world.ask("a", new=4)
    world.run()
    answers = {one.call_id: one for one in world.answers(CallDone)}
    assert not answers["0"].done
    assert answers["1"].done
    assert not answers["2"].done
    assert "stop_profile" in answers["2"].message
    assert [path.name for path in tmp_path.iterdir()] == ["p-0.trace.json.gz"]


def test_a_profile_that_cannot_record_does_no_harm(tmp_path, caplog):
    recorder = NotingRecorder()
    recorder.fails = True
    world = World(profile=ProfileSession(recorder))
    world.channel.send(StartProfile(call_id="1", folder=str(tmp_path), name="p"))
    order = StartProfile(call_id="2", folder=str(tmp_path), name="p", start_step=0, num_steps=1)
    world.channel.send(order)
    world.ask("a")
    with caplog.at_level(logging.ERROR):
        world.run()
    assert [one.done for one in world.answers(CallDone)] == [False, True]
    assert "another profiler runs" in caplog.text
    assert world.scheduler.status().num_finished == 1


def test_an_open_profile_is_written_at_the_end(tmp_path):
    world = World(profile=ProfileSession(NotingRecorder()))
    world.channel.send(StartProfile(call_id="1", folder=str(tmp_path), name="p"))
    world.ask("a")
    world.run()
    world.instruments.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_garbage_collection_can_be_frozen(monkeypatch):
    frozen = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    world = World()
    world.channel.send(FreezeGc("1"))
    world.channel.send(StopProfile("2"))
    world.run()
    assert [one.done for one in world.answers(CallDone)] == [True, False]
    assert frozen == [True]


def test_every_step_waits_while_the_engine_is_slowed_down(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    world = World()
    world.channel.send(SlowDown("1", 0.25))
    world.ask("a", new=3)
    world.run()
    assert [one.done for one in world.answers(CallDone)] == [True]
    assert slept == [0.25] * 3


@pytest.mark.parametrize("depth", [1, 2])
def test_traced_requests_leave_their_stages(depth):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    world = World(depth, spans=EngineSpans(Tracing(provider)))
    world.ask("traced", num_tokens=40, new=4, trace=TraceContext(TRACEPARENT, 5))
    world.ask("not traced")
    world.run()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert len(exporter.get_finished_spans()) == len(spans)
    assert set(spans) == {"dispatch", "prefill_waiting", "prefill_forward", "decode_loop"}
    for span in spans.values():
        assert format(span.parent.span_id, "016x") == TRACEPARENT.split("-")[2]
        assert span.attributes["gen_ai.request.id"] == "traced"
    assert spans["decode_loop"].attributes["gen_ai.usage.completion_tokens"] == 4
    assert spans["dispatch"].start_time == 5


def test_a_line_every_so_many_steps(caplog):
    world = World(status_log=StatusLog(num_steps=4))
    with caplog.at_level(logging.INFO):
        world.ask("a", new=9)
        world.run()
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 4", "step 8"]
    assert "running 1, waiting 0" in lines[0]


def test_the_ids_of_open_requests_are_written_every_so_often():
    now, lines = [0.0], Lines()
    log = StatusLog(num_steps=0, interval_s=10, sinks=[lines], now_s=lambda: now[0])
    world = World(status_log=log)
    world.ask("a", new=20)
    for _ in range(5):
        world.loop.turn(0.0)
    now[0] = 10.5
    for i in range(4):
        world.ask(f"b{i}", num_tokens=20, new=20)
    world.loop.turn(0.0)
    world.instruments.close()
    first, second, closed = lines.lines
    assert closed == "closed"
    assert json.loads(first)["event"] == "scheduler.status"
    assert json.loads(first)["running_rids"] == ["a"]
    event = msgspec.json.decode(second)
    assert event["rank"] == 0
    assert set(event["running_rids"]) | set(event["queued_rids"]) == {"a", "b0", "b1", "b2", "b3"}
