"""The gateway's metrics under the names of SGLang's gateway, kept in plain numbers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from sapwood.gateway.kv_watch import Follower
from sapwood.gateway.worker import Worker, WorkerState, WorkerType
from sapwood.observe.histogram import Histogram
from sapwood.observe.metrics import E2E_BOUNDS, ITL_BOUNDS, TTFT_BOUNDS, Family

PREFIX = "smg_"
EVENT = b"data: "
"""Begins an event of a stream, by which events are counted."""


class StreamTimes:
    """When the pieces of one stream came, and how many events they held."""

    __slots__ = ("_first_s", "_last_s", "_num_events", "_started_s")

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._first_s = 0.0
        self._last_s = 0.0
        self._num_events = 0

    def add(self, num_events: int) -> None:
        """A piece has come that ends so many events."""
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s
        self._num_events += num_events

    @property
    def first_s(self) -> float | None:
        """Seconds from the request to the first piece; None: there was none."""
        return self._first_s - self._started_s if self._first_s else None

    @property
    def per_event_s(self) -> float | None:
        """Seconds from one event to the next; None: there were less than two."""
        if self._num_events < 2:
            return None
        return (self._last_s - self._first_s) / (self._num_events - 1)


class Gauges(Protocol):
    """What is read when the metrics are."""

    @property
    def num_open(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...


class CacheCounts(Protocol):
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...


class CacheFigures(Protocol):
    """The caches of token ids, by level: "l0", "l1"."""

    @property
    def counts(self) -> Mapping[str, CacheCounts]: ...
    @property
    def num_bytes(self) -> Mapping[str, int]: ...


class GatewayMetrics(Collector):
    """All that /metrics shows. Labels are addresses of workers, our paths and names, and statuses:
    nothing that a client could make up.

    policies  name of the policy for each type of workers
    clock     as circuit breakers use it
    """

    def __init__(
        self, policies: Mapping[WorkerType, str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.policies = policies
        self._clock = clock
        self.workers: Callable[[], Iterable[Worker]] = tuple
        self.gauges: Gauges | None = None
        self.kv_events: Follower | None = None
        self.caches: CacheFigures | None = None
        self.num_retries = 0
        self.num_left = 0
        self.http_requests: Counter[tuple[str, str]] = Counter()
        self.http_responses: Counter[tuple[str, str, str]] = Counter()
        self._tool_calls: Counter[tuple[str, str]] = Counter()
        self._selections: Counter[tuple[str, str]] = Counter()
        self._answers: Counter[tuple[str, str]] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._durations = Histogram(E2E_BOUNDS)
        self._ttft = Histogram(TTFT_BOUNDS)
        self._tpot = Histogram(ITL_BOUNDS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def chosen(self, worker: Worker) -> None:
        self._selections[worker.url, self.policies[worker.spec.worker_type]] += 1

    def called_tool(self, server: str, is_good: bool) -> None:
        """A tool of an MCP server, which the gateway's operator has named, was called."""
        self._tool_calls[server, "success" if is_good else "error"] += 1

    def failed(self, worker: Worker, reason: str) -> None:
        """A worker failed a request: "no_answer", "broken_stream", or the answer's status."""
        self._failures[worker.url, reason] += 1

    def answered(
        self, worker: Worker, status: int, started_s: float, stream: StreamTimes | None
    ) -> None:
        """A worker's answer has been passed on in whole."""
        self._answers[worker.url, str(status)] += 1
        self._durations.observe(time.perf_counter() - started_s)
        if stream is None:
            return
        first_s, per_event_s = stream.first_s, stream.per_event_s
        if first_s is not None:
            self._ttft.observe(first_s)
        if per_event_s is not None:
            self._tpot.observe(per_event_s)

    @property
    def num_answers(self) -> int:
        """Answers that were passed on in whole, of the workers that there are."""
        return self._answers.total()

    def num_failures(self, worker: Worker) -> int:
        return sum(count for (url, _), count in self._failures.items() if url == worker.url)

    def forget(self, worker: Worker) -> None:
        """The worker is removed: its series end."""
        for counts in (self._answers, self._failures, self._selections):
            for key in [key for key in counts if key[0] == worker.url]:
                del counts[key]

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        for family in self._families():
            yield family.under(PREFIX)

    def _families(self) -> Iterator[Family]:
        yield Family(
            "counter",
            "http_requests",
            "Calls of the gateway.",
            ("method", "path"),
            list(self.http_requests.items()),
        )
        yield Family(
            "counter",
            "http_responses",
            "Answers of the gateway.",
            ("method", "path", "status_code"),
            list(self.http_responses.items()),
        )
        yield Family(
            "counter",
            "router_requests",
            "Answers of workers that were passed on in whole.",
            ("worker", "status_code"),
            list(self._answers.items()),
        )
        yield Family(
            "counter",
            "router_request_errors",
            "Requests that a worker failed: no answer, a broken one, or its status.",
            ("worker", "error_type"),
            list(self._failures.items()),
        )
        yield Family(
            "counter",
            "worker_selection",
            "Choices of a worker.",
            ("worker", "policy"),
            list(self._selections.items()),
        )
        yield Family(
            "counter",
            "mcp_tool_calls",
            "Calls of tools of MCP servers.",
            ("server", "result"),
            list(self._tool_calls.items()),
        )
        for name, text, value in (
            ("worker_retries", "Requests that were sent again.", self.num_retries),
            ("router_client_disconnects", "Clients that left before the end.", self.num_left),
        ):
            yield Family("counter", name, text, (), [((), value)])
        for name, text, histogram in (
            ("router_request_duration_seconds", "Until an answer's end.", self._durations),
            ("router_ttft_seconds", "Until the first bytes of a stream.", self._ttft),
            ("router_tpot_seconds", "From one event of a stream to the next.", self._tpot),
        ):
            yield Family("histogram", name, text, (), [((), histogram)])
        yield from self._gauges()
        if self.caches is not None:
            yield from _of_caches(self.caches)

    def _gauges(self) -> Iterator[Family]:
        workers, now_s = list(self.workers()), self._clock()
        if self.gauges is not None:
            for name, text, value in (
                ("router_requests_active", "Requests at the workers.", self.gauges.num_open),
                ("router_requests_queued", "Requests that wait.", self.gauges.num_waiting),
            ):
                yield Family("gauge", name, text, (), [((), value)])
        if self.kv_events is not None:
            yield from _kv_families(self.kv_events, workers)
        states = Counter(worker.state.value for worker in workers)
        yield Family(
            "gauge",
            "worker_pool_size",
            "Workers by state.",
            ("state",),
            [((state.value,), states[state.value]) for state in WorkerState],
        )
        for name, text, read in _WORKER_GAUGES:
            rows = [((worker.url,), read(worker, now_s)) for worker in workers]
            yield Family("gauge", name, text, ("worker",), rows)


def _kv_families(follower: Follower, workers: Iterable[Worker]) -> Iterator[Family]:
    num_events, num_gaps = follower.counts
    for name, text, value in (
        ("kv_events", "Events of the prefix caches that are followed now.", num_events),
        ("kv_event_gaps", "Times that some of these were lost for good.", num_gaps),
    ):
        yield Family("gauge", name, text, (), [((), value)])
    rows = [((worker.url,), follower.known.num_pages(worker.id)) for worker in workers]
    yield Family("gauge", "worker_kv_pages", "Pages known of its cache.", ("worker",), rows)


def _of_caches(caches: CacheFigures) -> Iterator[Family]:
    counts, text = caches.counts, "Lookups of token ids"
    hits = [((level,), count.hits) for level, count in counts.items()]
    misses = [((level,), count.misses) for level, count in counts.items()]
    sizes = [((level,), size) for level, size in caches.num_bytes.items()]
    level = ("level",)
    yield Family("counter", "tokenizer_cache_hits", f"{text} that found them.", level, hits)
    yield Family("counter", "tokenizer_cache_misses", f"{text} in vain.", level, misses)
    yield Family("gauge", "tokenizer_cache_bytes", "Memory of token ids.", level, sizes)


_WORKER_GAUGES: Sequence[tuple[str, str, Callable[[Worker, float], float]]] = (
    ("worker_health", "1: ready; 0: not.", lambda w, now_s: float(w.state is WorkerState.READY)),
    (
        "worker_cb_state",
        "Circuit breaker: 0 closed, 1 open, 2 half open.",
        lambda w, now_s: float(w.breaker.state(now_s)),
    ),
    ("worker_requests_active", "Open requests.", lambda w, now_s: w.num_open),
    ("worker_connections_active", "Open connections.", lambda w, now_s: w.pool.num_open),
)
