"""Instruments of an engine's loop: heartbeat, traces, profiles and the log of its state."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import psutil

from sapwood.base.errors import InvalidRequest
from sapwood.engine.request_state import Phase
from sapwood.engine.scheduler import Scheduler
from sapwood.observe.profiling import ACTIVITIES, ProfileOrder, ProfileSession
from sapwood.observe.request_log import SCHEDULER_STATUS, LineSink, write_event
from sapwood.observe.tracing import EngineSpans
from sapwood.schema.output import CallDone, EngineStatus, RequestOutput
from sapwood.schema.request import FreezeGc, Generate, SlowDown, StartProfile, StopProfile
from sapwood.schema.step import StepPlan

log = logging.getLogger(__name__)


class Heartbeat(Protocol):
    """See `observe.watchdog.Watchdog`."""

    def beat(self, doing: str) -> None: ...

    def rest(self) -> None: ...

    @property
    def is_resting(self) -> bool: ...


class Instruments:
    """Called by the loop at fixed places; an instrument that is not in use costs next to nothing.

    heartbeat   told of each step
    spans       told of traced requests
    profile     records steps
    status_log  told of each step
    """

    def __init__(
        self,
        *,
        heartbeat: Heartbeat | None = None,
        spans: EngineSpans | None = None,
        profile: ProfileSession | None = None,
        status_log: StatusLog | None = None,
    ) -> None:
        self._heartbeat = heartbeat
        self._spans = spans
        self._profile = profile
        self._status_log = status_log
        self._sleep_s = 0.0
        self._process = psutil.Process()

    def before_request(self, request: Generate) -> None:
        if self._heartbeat is not None and self._heartbeat.is_resting:
            self._heartbeat.beat("computing the first step after a pause")
        if self._spans is not None and request.trace is not None:
            self._spans.accepted(
                request.request_id, request.trace.traceparent, request.trace.sent_ns
            )

    def before_step(self, plan: StepPlan) -> None:
        if self._sleep_s:
            time.sleep(self._sleep_s)
        if self._profile is not None and self._profile.is_active:
            is_prefill = bool(plan.scheduled) and plan.scheduled[-1].num_new > 1
            try:
                self._profile.before_step(plan.step, "prefill" if is_prefill else "decode")
            except OSError as error:
                log.error("the profile was given up: %s", error)

    def after_step(self, scheduler: Scheduler) -> None:
        if self._heartbeat is not None:
            self._heartbeat.beat("computing a step")
        if self._profile is not None and self._profile.is_active:
            self._end_of_profile()
        if self._status_log is not None:
            self._status_log.after_step(scheduler)

    def before_outputs(self, outputs: Sequence[RequestOutput]) -> None:
        if self._spans is not None:
            self._spans.outputs(outputs)

    def after_turn(self, *, is_busy: bool, only_waits: bool) -> None:
        """only_waits: all open requests wait for grammars that other threads compile."""
        if self._heartbeat is None:
            return
        if not is_busy:
            self._heartbeat.rest()
        elif only_waits:
            self._heartbeat.beat("waiting for a grammar to be compiled")

    def completed(self, status: EngineStatus) -> EngineStatus:
        """The status, with the processor time and the memory of this process."""
        return msgspec.structs.replace(
            status,
            cpu_seconds=time.process_time(),
            resident_bytes=self._process.memory_info().rss,
        )

    def control(self, message: StartProfile | StopProfile | FreezeGc | SlowDown) -> CallDone:
        try:
            if isinstance(message, FreezeGc):
                gc.collect()
                gc.freeze()
                text = f"{gc.get_freeze_count()} objects are exempt from garbage collection"
            elif isinstance(message, SlowDown):
                self._sleep_s = message.sleep_s
                text = f"the engine rests {message.sleep_s:g} s before each step"
            elif self._profile is None:
                raise InvalidRequest("this engine cannot be profiled")
            elif isinstance(message, StartProfile):
                text = self._profile.begin(_order(message))
            else:
                text = _written(self._profile.end())
        except (InvalidRequest, OSError) as error:
            return CallDone(message.call_id, False, str(error))
        return CallDone(message.call_id, True, text)

    def close(self) -> None:
        """End the profile, and send and write what the other instruments still hold."""
        if self._profile is not None and self._profile.is_active:
            log.info(_written(self._profile.end()))
        if self._spans is not None:
            self._spans.close()
        if self._status_log is not None:
            self._status_log.close()

    def _end_of_profile(self) -> None:
        assert self._profile is not None
        try:
            files = self._profile.after_step()
        except OSError as error:
            log.error("the profile could not be written: %s", error)
            return
        if files is not None:
            log.info(_written(files))


class StatusLog:
    """Logs the engine's state: lines for people, and events as JSON.

    num_steps   steps between two lines; 0: no lines
    interval_s  seconds between two events, which have the ids of all open requests; 0: no events
    sinks       where events are written
    """

    def __init__(
        self,
        *,
        num_steps: int,
        interval_s: float = 0.0,
        sinks: Sequence[LineSink] = (),
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._interval_s = interval_s
        self._sinks = sinks
        self._now_s = now_s
        self._since_line = 0
        self._last: EngineStatus | None = None
        self._last_s = now_s()
        self._next_event_s = now_s()

    def after_step(self, scheduler: Scheduler) -> None:
        self._since_line += 1
        if self._since_line == self._num_steps:
            self._since_line = 0
            self._write_line(scheduler.status())
        if self._interval_s and self._now_s() >= self._next_event_s:
            self._next_event_s = self._now_s() + self._interval_s
            content = {
                "rank": 0,
                "running_rids": scheduler.request_ids(Phase.RUNNING),
                "queued_rids": scheduler.request_ids(Phase.WAITING),
            }
            write_event(self._sinks, SCHEDULER_STATUS, content, as_json=True)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _write_line(self, now: EngineStatus) -> None:
        before, self._last = self._last, now
        before_s, self._last_s = self._last_s, self._now_s()
        elapsed_s = max(self._last_s - before_s, 1e-6)
        num_out = now.num_output_tokens - (before.num_output_tokens if before else 0)
        num_prefill = now.num_prefill_tokens - (before.num_prefill_tokens if before else 0)
        num_cached = now.num_cached_tokens - (before.num_cached_tokens if before else 0)
        log.info(
            "step %d: running %d, waiting %d; %.0f output and %.0f prompt tokens/s; KV pool "
            "%.1f%% in use; cache hit rate %.0f%%; retracted %d",
            now.num_steps,
            now.num_running,
            now.num_waiting,
            num_out / elapsed_s,
            num_prefill / elapsed_s,
            100 * now.num_leased_pages / max(now.num_pages, 1),
            100 * num_cached / max(num_cached + num_prefill, 1),
            now.num_retractions,
        )


def _order(message: StartProfile) -> ProfileOrder:
    return ProfileOrder(
        folder=Path(message.folder),
        name=message.name,
        start_step=message.start_step,
        num_steps=message.num_steps,
        activities=message.activities or ACTIVITIES,
        by_stage=message.by_stage,
        with_stack=message.with_stack,
        record_shapes=message.record_shapes,
    )


def _written(files: Sequence[Path]) -> str:
    if not files:
        return "the profile has ended; no step ran meanwhile, so no file was written"
    return f"the profile was written to {', '.join(map(str, files))}"
