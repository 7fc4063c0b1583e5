"""The one loop of an engine: messages in, steps through the executor, messages out.

The loop's depth is how many steps may be in flight. At depth 1 a step's result is awaited before
the next step is planned. At depth 2 the next step is planned and launched while the previous one
runs (overlap); pipeline stages are a larger depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from sapwood.base.channel import Receiver, Sender
from sapwood.base.clock import Clock
from sapwood.base.errors import InvalidRequest
from sapwood.engine.adapters import AdapterDesk
from sapwood.engine.instruments import Instruments
from sapwood.engine.joint_steps import JointSteps
from sapwood.engine.scheduler import Scheduler
from sapwood.engine.steering import NO_WEIGHTS, Steering
from sapwood.engine.tier_desk import TierDesk
from sapwood.schema.output import (
    CacheFlushed,
    CallDone,
    EngineOutput,
    Finish,
    KVEventCounts,
    RequestOutput,
    StepOutputs,
)
from sapwood.schema.request import (
    Abort,
    Continue,
    Drain,
    EngineEnds,
    EngineInput,
    FlushCache,
    FreezeGc,
    Generate,
    GetStatus,
    LoadAdapter,
    OrderWeights,
    Pause,
    RecordExperts,
    SlowDown,
    StartProfile,
    SteerTiers,
    StepBegun,
    StopProfile,
    UnloadAdapter,
)
from sapwood.schema.step import IDLE_STEP, StepHandle, StepPlan
from sapwood.schema.weights import SetLimits

DRAIN_POLL_S = 0.1
GRAMMAR_POLL_S = 0.001
"""Seconds between two looks at what is compiled or loaded, while there is nothing else to do."""
NO_TIERS = "this engine keeps no prefixes in further tiers"
NO_ADAPTERS = "this server was started without LoRA adapters; start it with --enable-lora"


class StepExecutor(Protocol):
    def launch(self, plan: StepPlan) -> StepHandle:
        """Start the step after all earlier steps."""
        ...


class ChoiceRecord(Protocol):
    """What is recorded of the experts that tokens choose; each method tells what it has done."""

    def start(self) -> str: ...

    def stop(self) -> str: ...

    def dump(self, suffix: str) -> str:
        """Write a file. InvalidRequest if nothing was recorded; OSError or RuntimeError if the file
        cannot be written."""
        ...


class Published(Protocol):
    """Events that were published, and those for which there was no room."""

    @property
    def num_published(self) -> int: ...
    @property
    def num_dropped(self) -> int: ...


class EngineLoop:
    """Runs until it is drained. The error of a step ends the loop: `run` raises it."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: StepExecutor,
        receiver: Receiver[EngineInput],
        sender: Sender[EngineOutput],
        *,
        depth: int,
        clock: Clock,
        instruments: Instruments | None = None,
        adapters: AdapterDesk | None = None,
        joint: JointSteps | None = None,
        experts: ChoiceRecord | None = None,
        kv_events: Published | None = None,
        steering: Steering | None = None,
        tiers: TierDesk | None = None,
    ) -> None:
        """A loop that has not begun.

        joint      the steps that other engines compute too; None: this engine shares none
        experts    records which experts are chosen; None: it cannot be asked for
        kv_events  counts what is published of the prefix cache; None: nothing is
        steering   carries out orders about weights; None: one that refuses them
        tiers      carries out orders about the storage tier; None: they are refused
        """
        self._tiers = tiers
        self._steering = steering or Steering(scheduler, None)
        self._instruments = instruments or Instruments()
        self._adapters = adapters
        self._joint = joint
        self._experts = experts
        self._kv_events = kv_events
        self._scheduler = scheduler
        self._executor = executor
        self._receiver = receiver
        self._sender = sender
        self._depth = depth
        self._clock = clock
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
        self._drain_until_s: float | None = None
        self._outputs: list[RequestOutput] = []
        self._handlers: dict[type, Callable[..., None]] = {
            Generate: self._on_generate,
            Abort: self._on_abort,
            FlushCache: self._on_flush,
            GetStatus: self._on_status,
            StartProfile: self._on_control,
            StopProfile: self._on_control,
            RecordExperts: self._on_record_experts,
            FreezeGc: self._on_control,
            SlowDown: self._on_control,
            LoadAdapter: self._on_load_adapter,
            UnloadAdapter: self._on_unload_adapter,
            OrderWeights: self._on_order,
            Pause: self._on_pause,
            Continue: self._on_continue,
            SteerTiers: self._on_tiers,
            Drain: self._on_drain,
        }
        if joint is not None:
            self._handlers |= {StepBegun: joint.on_begun, EngineEnds: joint.on_ends}

    def run(self) -> None:
        while not self._is_drained():
            self.turn(self._patience_s())

    def turn(self, timeout_s: float | None) -> None:
        """Take in messages, waiting up to `timeout_s` for the first; then launch the next step, and
        take in the result of the oldest step if no more may be in flight."""
        for message in self._receiver.receive(timeout_s):
            self._handlers[type(message)](message)
        self._abort_at_drain_limit()
        if self._adapters is not None:
            self._adapters.finished(self._tell)
        self._outputs += self._scheduler.end_overdue()
        self._steering.between_steps(self._tell, is_idle=not self._in_flight)
        plan = self._scheduler.plan() if self._steering.may_step else None
        if plan is not None:
            self._instruments.before_step(plan)
            if self._joint is not None and plan.scheduled:
                self._joint.begin()
            self._in_flight.append((plan, self._executor.launch(plan)))
        elif self._joint is not None and self._joint.is_awaited and not self._in_flight:
            self._joint.begin()
            self._executor.launch(IDLE_STEP).result()
        if self._in_flight and (plan is None or len(self._in_flight) >= self._depth):
            done, handle = self._in_flight.popleft()
            self._outputs += self._scheduler.update(done, handle.result())
            self._instruments.after_step(self._scheduler)
        if self._outputs:
            self._instruments.before_outputs(self._outputs)
            self._sender.send(StepOutputs(self._outputs))
            self._outputs = []
        self._instruments.after_turn(
            is_busy=bool(self._in_flight)
            or (self._scheduler.has_open_requests and self._steering.may_step),
            only_waits=not self._has_work(),
        )

    def _has_work(self) -> bool:
        is_awaited = self._joint is not None and self._joint.is_awaited
        has_steps = self._scheduler.has_work and self._steering.may_step
        return bool(self._in_flight) or has_steps or is_awaited or self._steering.is_busy

    def _patience_s(self) -> float | None:
        if self._has_work():
            return 0.0
        if self._steering.waits_for_others:
            return GRAMMAR_POLL_S
        is_loading = self._adapters is not None and self._adapters.is_loading
        if not self._steering.may_step and (self._scheduler.has_open_requests or is_loading):
            return DRAIN_POLL_S
        if self._scheduler.has_open_requests or self._scheduler.is_fetching or is_loading:
            return GRAMMAR_POLL_S
        return None if self._drain_until_s is None else DRAIN_POLL_S

    def _is_drained(self) -> bool:
        return (
            self._drain_until_s is not None
            and not self._in_flight
            and not self._scheduler.has_open_requests
            and (self._joint is None or self._joint.may_end())
        )

    def _abort_at_drain_limit(self) -> None:
        if self._drain_until_s is None or self._clock.now_s() < self._drain_until_s:
            return
        for request_id in self._scheduler.open_request_ids:
            self._take(self._scheduler.abort(request_id, reason="the server is shutting down"))

    def _on_generate(self, request: Generate) -> None:
        self._instruments.before_request(request)
        if self._drain_until_s is None:
            self._take(self._scheduler.add(request))
            return
        refusal = Finish(
            kind="error",
            message="the server is shutting down",
            status=503,
            error_type="ServiceUnavailableError",
        )
        self._take(
            RequestOutput(
                request_id=request.request_id,
                token_ids=[],
                num_prompt_tokens=len(request.prompt_ids),
                finish=refusal,
            )
        )

    def _on_abort(self, message: Abort) -> None:
        self._take(self._scheduler.abort(message.request_id))

    def _on_flush(self, message: FlushCache) -> None:
        done = self._scheduler.flush_cache()
        text = (
            "the prefix cache is empty now"
            if done
            else "requests are open, so the prefix cache was not flushed; try again when idle"
        )
        self._sender.send(CacheFlushed(message.call_id, done, text))

    def _on_status(self, message: GetStatus) -> None:
        status = self._instruments.completed(self._scheduler.status(message.call_id))
        if self._kv_events is not None:
            counts = KVEventCounts(
                num_published=self._kv_events.num_published,
                num_dropped=self._kv_events.num_dropped,
            )
            status = msgspec.structs.replace(status, kv_events=counts)
        self._sender.send(status)

    def _on_control(self, message: StartProfile | StopProfile | FreezeGc | SlowDown) -> None:
        self._sender.send(self._instruments.control(message))

    def _on_record_experts(self, message: RecordExperts) -> None:
        record = self._experts
        if record is None:
            why = "start the server with --expert-distribution-recorder-mode to record experts"
            self._tell(message.call_id, False, why)
            return
        try:
            match message.action:
                case "start":
                    told = record.start()
                case "stop":
                    told = record.stop()
                case "dump":
                    told = record.dump(message.suffix)
        except (InvalidRequest, OSError, RuntimeError) as error:
            self._tell(message.call_id, False, str(error))
        else:
            self._tell(message.call_id, True, told)

    def _on_load_adapter(self, message: LoadAdapter) -> None:
        if self._adapters is None:
            self._tell(message.call_id, False, NO_ADAPTERS)
        else:
            self._adapters.load(message)

    def _on_unload_adapter(self, message: UnloadAdapter) -> None:
        why_not = NO_ADAPTERS
        if self._adapters is not None:
            why_not = self._adapters.unload(message.adapter_id) or ""
        self._tell(message.call_id, not why_not, why_not or "unloaded")

    def _on_order(self, message: OrderWeights) -> None:
        if isinstance(message.order, SetLimits):
            self._scheduler.set_limits(message.order)
            self._tell(message.call_id, True, "the limits hold from now on")
            return
        if self._joint is not None:
            self._tell(message.call_id, False, NO_WEIGHTS)
            return
        if message.abort_all:
            self._outputs += self._steering.abort_all("the weights are being changed")
        self._steering.order(message)

    def _on_pause(self, message: Pause) -> None:
        if self._joint is not None:
            self._tell(message.call_id, False, "engines that share feed-forwards cannot pause")
            return
        if message.mode == "abort":
            self._outputs += self._steering.abort_all("generation is paused")
        self._steering.pause(message)

    def _on_continue(self, message: Continue) -> None:
        self._tell(message.call_id, True, self._steering.go_on())

    def _on_tiers(self, message: SteerTiers) -> None:
        if self._tiers is None:
            self._tell(message.call_id, False, NO_TIERS)
            return
        is_idle = not (self._scheduler.has_open_requests or self._in_flight)
        self._tell(message.call_id, *self._tiers.steer(message, is_idle=is_idle))

    def _tell(self, call_id: str, done: bool, message: str) -> None:
        self._sender.send(CallDone(call_id, done, message))

    def _on_drain(self, message: Drain) -> None:
        until_s = self._clock.now_s() + message.timeout_s
        # A second order may hurry a drain, but not delay it.
        if self._drain_until_s is None or until_s < self._drain_until_s:
            self._drain_until_s = until_s

    def _take(self, output: RequestOutput | None) -> None:
        if output is not None:
            self._outputs.append(output)
