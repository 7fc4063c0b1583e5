"""One request under observation: counted, timed, logged, traced, and kept for a crash dump."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from sapwood.base.errors import SapwoodError
from sapwood.observe.call import Call, current_call
from sapwood.observe.crash_dump import RecentRequests, Record, RequestDump, write_crash_dump
from sapwood.observe.histogram import LatencyWindow
from sapwood.observe.metrics import Metrics, RequestSeries
from sapwood.observe.request_log import LineSink, RequestLog, write_event
from sapwood.observe.tracing import RequestTrace, Tracing

WINDOW_TICKS = 60
"""The live percentiles cover this many ticks of one second each."""

_TEXTS = frozenset({"prompt", "text"})
"""What only a log that was asked for shows of a request."""

Outcome = Literal["finished", "aborted", "failed", "refused"]


class OptionFacts(Protocol):
    """The observed part of what a request asks for; see `schema.request.RequestOptions`."""

    @property
    def sampling(self) -> Any: ...
    @property
    def priority(self) -> int | None: ...


class RequestFacts(Protocol):
    """The fields of a request that are observed; see `text.generation.TextRequest`."""

    @property
    def request_id(self) -> str: ...
    @property
    def prompt(self) -> str | list[int]: ...
    @property
    def n(self) -> int: ...
    @property
    def options(self) -> OptionFacts: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`RequestFacts` for requests that are no `TextRequest`."""

    request_id: str
    prompt: str | list[int]
    options: OptionFacts
    n: int = 1


class FinishFacts(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def message(self) -> str | None: ...
    @property
    def status(self) -> int: ...


class ChunkFacts(Protocol):
    """The fields of a chunk of text that are observed; see `text.generation.TextChunk`."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish(self) -> FinishFacts | None: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def queue_time_s(self) -> float: ...


class AnswerFacts(Protocol):
    """The outcome of a request without output tokens; see `text.embedding.PoolingOutput`."""

    @property
    def finish(self) -> FinishFacts: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def queue_time_s(self) -> float: ...


class RequestObserver:
    """Observes the text requests of one API process, on its event loop.

    export  where a line goes for each request that has ended, without its texts
    about  version, model and options of the server, for a crash dump
    """

    def __init__(
        self,
        metrics: Metrics | None = None,
        *,
        log: RequestLog | None = None,
        tracing: Tracing | None = None,
        crash_dump_folder: Path | None = None,
        export: Sequence[LineSink] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.metrics = metrics or Metrics("")
        self.log = log or RequestLog()
        self.tracing = tracing
        self.export = tuple(export)
        self.ttft = LatencyWindow(WINDOW_TICKS)
        self.itl = LatencyWindow(WINDOW_TICKS)
        self.dump: RequestDump | None = None
        self._about = dict(about or {})
        self._crash_dump_folder: Path | None = None
        self.recent: RecentRequests | None = None
        self.set_crash_dump_folder(crash_dump_folder)

    def set_crash_dump_folder(self, folder: Path | None) -> None:
        """Write crash dumps there from now on; None: keep no requests and write no dumps."""
        self._crash_dump_folder = folder
        self.recent = None if folder is None else self.recent or RecentRequests()

    @property
    def keeps_text(self) -> bool:
        return self.recent is not None or self.dump is not None or self.log.wants_text

    @contextmanager
    def observing(self, requests: Sequence[RequestFacts]) -> Iterator[list[ObservedRequest]]:
        """Observe requests that are answered together, until the `with` block is left.

        An exception that leaves the block is the reason for which they have ended.
        """
        call = current_call.get()
        observed = [ObservedRequest(self, request, call) for request in requests]
        try:
            yield observed
        except BaseException as error:
            for request in observed:
                request.end(error)
            raise
        for request in observed:
            request.end(None)

    def tick(self) -> None:
        """Once a second: move the window of the live percentiles on."""
        self.ttft.tick()
        self.itl.tick()

    def write_crash_dump(self, reason: str) -> Path | None:
        """The requests of the last minutes as a file; None if that is not wanted or impossible."""
        if self._crash_dump_folder is None or self.recent is None:
            return None
        records = self.recent.records()
        return write_crash_dump(self._crash_dump_folder, reason, records, self._about)

    def close(self) -> None:
        """Write the gathered requests and send the traces that are left."""
        if self.dump is not None:
            self.dump.flush()
        if self.tracing is not None:
            self.tracing.close()
        for sink in self.export:
            sink.close()
        self.log.close()


class ObservedRequest:
    """One text request with its n samples, from its arrival on."""

    def __init__(self, observer: RequestObserver, request: RequestFacts, call: Call | None) -> None:
        self._observer = observer
        self._request = request
        self._path = call.path if call is not None else ""
        self._arrived_s = time.monotonic()
        self._arrived_unix_s = time.time()
        self._series: RequestSeries = observer.metrics.series(call.labels if call else ())
        self._last_s = [0.0] * request.n
        self._finishes: list[FinishFacts | None] = [None] * request.n
        self._texts: list[list[str]] | None = None
        self._num_output_tokens = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._ttft_s: float | None = None
        self._queue_time_s = 0.0
        self._series.num_requests += 1
        self._series.num_open += 1
        if observer.keeps_text:
            self._texts = [[] for _ in range(request.n)]
        self._is_kept = observer.recent
        if self._is_kept is not None:
            self._is_kept.begin(id(self), self._record)
        if observer.log.enabled:
            observer.log.received(request.request_id, self._asked())
        self.trace: RequestTrace | None = None
        if observer.tracing is not None:
            parent = call.trace if call is not None else None
            self.trace = RequestTrace(observer.tracing, parent, request.request_id, request.n)

    def chunk(self, chunk: ChunkFacts) -> None:
        """Count a chunk of text. This is called for every chunk, so every line here costs."""
        num_new = len(chunk.token_ids)
        if num_new:
            series = self._series
            index = chunk.index
            now_s = time.monotonic()
            last_s = self._last_s[index]
            if last_s:
                each_s = (now_s - last_s) / num_new
                series.itl.observe(each_s, num_new)
                self._observer.itl.observe(each_s, num_new)
            else:
                self._first_tokens(chunk, now_s - self._arrived_s)
            self._last_s[index] = now_s
            series.generation_tokens += num_new
            self._num_output_tokens += num_new
        if self._texts is not None:
            self._texts[chunk.index].append(chunk.text)
        if chunk.finish is not None:
            self._sample_ended(chunk, chunk.finish)

    def answered(self, answer: AnswerFacts) -> None:
        """Count the answer to a request for an embedding or scores."""
        self._finishes[0] = answer.finish
        if answer.finish.kind in ("stop", "length"):
            self._series.e2e.observe(time.monotonic() - self._arrived_s)
            self._take_prompt(answer)

    def end(self, error: BaseException | None) -> None:
        """The request has ended: by itself, or because of `error`."""
        outcome = self._outcome(error)
        series = self._series
        series.num_open -= 1
        if outcome == "finished":
            series.num_finished += 1
        elif outcome == "refused":
            series.num_refused += 1
        else:
            series.num_aborted += 1
            series.num_failed += outcome == "failed"
        observer = self._observer
        message = None if outcome in ("finished", "aborted") else self._problem(error)
        if self.trace is not None:
            self.trace.end(outcome, self._trace_attributes(), error=message)
        if not (observer.log.enabled or self._is_kept or observer.dump or observer.export):
            return
        output = self._out(outcome, message)
        if observer.export:
            figures = {
                name: value
                for name, value in (self._asked() | output).items()
                if name not in _TEXTS
            }
            write_event(observer.export, "request", figures, as_json=True)
        observer.log.finished(self._request.request_id, self._asked(), output)
        if self._is_kept is not None or observer.dump is not None:
            record = self._asked() | output
            if self._is_kept is not None:
                self._is_kept.end(id(self), record)
            if observer.dump is not None:
                observer.dump.add(record)

    # ---- inside ------------------------------------------------------------------------------

    def _first_tokens(self, chunk: ChunkFacts, ttft_s: float) -> None:
        series = self._series
        series.ttft.observe(ttft_s)
        self._observer.ttft.observe(ttft_s)
        if self._ttft_s is not None:
            return
        self._ttft_s = ttft_s
        self._take_prompt(chunk)

    def _take_prompt(self, facts: ChunkFacts | AnswerFacts) -> None:
        series = self._series
        self._queue_time_s = facts.queue_time_s
        self._num_prompt_tokens = facts.num_prompt_tokens
        self._num_cached_tokens = facts.num_cached_tokens
        series.queue_time.observe(facts.queue_time_s)
        series.prompt_lengths.observe(facts.num_prompt_tokens)
        series.prompt_tokens += facts.num_prompt_tokens
        series.cached_tokens += facts.num_cached_tokens

    def _sample_ended(self, chunk: ChunkFacts, finish: FinishFacts) -> None:
        self._finishes[chunk.index] = finish
        if finish.kind in ("stop", "length"):
            self._series.e2e.observe(time.monotonic() - self._arrived_s)
            self._series.output_lengths.observe(chunk.num_output_tokens)

    def _outcome(self, error: BaseException | None) -> Outcome:
        kinds = [None if finish is None else finish.kind for finish in self._finishes]
        if all(kind in ("stop", "length") for kind in kinds):
            # Also for a reader that left early, and when another request of its call has failed.
            return "finished"
        if error is None:
            return "failed" if "error" in kinds else "aborted"
        if isinstance(error, (GeneratorExit, asyncio.CancelledError)):
            return "aborted"
        is_refusal = isinstance(error, SapwoodError) and (error.status < 500 or error.status == 503)
        return "refused" if is_refusal and self._ttft_s is None else "failed"

    def _problem(self, error: BaseException | None) -> str:
        if error is not None:
            return str(error)
        said = [
            finish.message
            for finish in self._finishes
            if finish is not None and finish.kind == "error"
        ]
        return said[0] or "the engine failed" if said else "the engine failed"

    def _asked(self) -> Record:
        request = self._request
        return {
            "request_id": request.request_id,
            "received": self._arrived_unix_s,
            "path": self._path,
            "n": request.n,
            "priority": request.options.priority,
            "prompt_length": len(request.prompt),
            "sampling_params": msgspec.to_builtins(request.options.sampling),
            "prompt": request.prompt,
        }

    def _out(self, outcome: str, message: str | None) -> Record:
        finishes = [None if finish is None else finish.kind for finish in self._finishes]
        output: Record = {
            "outcome": outcome,
            "finish_reason": finishes,
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "cached_tokens": self._num_cached_tokens,
            "queue_time": self._queue_time_s,
            "ttft": self._ttft_s,
            "e2e_latency": time.monotonic() - self._arrived_s,
        }
        if message is not None:
            output["error"] = message
        if self._texts is not None:
            output["text"] = ["".join(parts) for parts in self._texts]
        return output

    def _record(self) -> Record:
        return self._asked() | self._out("open", None)

    def _trace_attributes(self) -> dict[str, int | float]:
        attributes: dict[str, int | float] = {
            "gen_ai.usage.prompt_tokens": self._num_prompt_tokens,
            "gen_ai.usage.completion_tokens": self._num_output_tokens,
            "sapwood.cached_tokens": self._num_cached_tokens,
        }
        if self._ttft_s is not None:
            attributes["gen_ai.server.time_to_first_token"] = self._ttft_s
        return attributes
