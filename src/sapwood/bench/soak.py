"""A long mixed load on a running server: does anything leak, break or get lost?

Requests of mixed lengths come without end; some ask for several samples, some share a prefix, some
bring priorities, and some clients leave in the middle. Afterwards the server's own figures must add
up. The client runs on the server's machine if the server's memory is to be watched.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sapwood.base.errors import ConfigError
from sapwood.bench.http_stream import (
    Endpoint,
    HttpError,
    ResponseParser,
    SseParser,
    exchange,
    fetch_json,
    status_message,
)
from sapwood.bench.workloads.vocabulary import WORDS
from sapwood.schema.config.options import option

IDLE_LIMIT_S = 60.0
SAMPLE_INTERVAL_S = 1.0
CALL_TIMEOUT_S = 30.0
MAX_SAMPLES = 4
PRIORITIES = 5
"""Requests have priorities from -PRIORITIES to PRIORITIES, if the server takes priorities."""
REFUSALS = (429, 503)
"""Statuses of a busy server; any other status but 200 is a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakOptions:
    """The load on the server, and its duration."""

    url: str = option("http://127.0.0.1:30000", "Base URL of the server, without /v1.")
    duration: float = option(900.0, "How long to send requests.", unit="seconds")
    concurrency: int = option(32, "Requests in flight.", unit="requests")
    max_prompt_words: int = option(200, "Longest prompt.", unit="words")
    max_output_tokens: int = option(128, "Most output tokens of a request.", unit="tokens")
    abort_fraction: float = option(0.2, "Share of requests whose client leaves midway, 0 to 1.")
    several_fraction: float = option(0.2, "Share of requests that ask for 2 to 4 samples, 0 to 1.")
    settle_time: float = option(
        60.0, "Memory is compared with what it is after this long.", unit="seconds"
    )
    max_memory_growth: float = option(
        0.03, "Growth of resident memory from then on, as a share, that is no leak."
    )
    server_pid: int | None = option(
        None, "The server's process, to watch its memory; default: what listens on the port."
    )
    log_file: str | None = option(
        None, "The server's log, which must hold no stack trace; default: it is not read."
    )
    api_key: str | None = option(None, "Sent as a bearer token.", secret=True)
    admin_api_key: str | None = option(
        None, "Sent as a bearer token to /flush_cache; default: --api-key.", secret=True
    )
    seed: int = option(0, "Seed of all that is random.")

    def __post_init__(self) -> None:
        for name in ("duration", "concurrency", "max_prompt_words", "max_output_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be > 0")
        for name in ("abort_fraction", "several_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be from 0 to 1")
        if not 0 <= self.settle_time < self.duration:
            raise ConfigError("--settle-time must be >= 0 and less than --duration")

    def headers(self, *, admin: bool = False) -> dict[str, str]:
        key = (self.admin_api_key if admin else None) or self.api_key
        return {} if key is None else {"authorization": f"Bearer {key}"}


@dataclass
class SoakReport:
    """The outcome of a run.

    requests  ended requests by outcome: finished, left, refused, failed
    resident_bytes  (seconds since the start, bytes of all the server's processes)
    problems  one line for each problem
    """

    requests: Counter[str] = field(default_factory=Counter)
    num_samples: int = 0
    resident_bytes: list[tuple[float, int]] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        made = ", ".join(f"{count} {what}" for what, count in sorted(self.requests.items()))
        lines = [f"requests: {made}; {self.num_samples} samples asked for"]
        lines.append(
            "engine:   " + ", ".join(f"{name} {n}" for name, n in sorted(self.counters.items()))
        )
        if self.resident_bytes:
            sizes = [size for _, size in self.resident_bytes]
            lines.append(
                f"memory:   {sizes[0] / 2**20:.0f} MiB at first, {max(sizes) / 2**20:.0f} at most, "
                f"{sizes[-1] / 2**20:.0f} at last"
            )
        return lines


class _Left(Exception):
    """Raised to leave in the middle of an answer."""


class Soak:
    """One run of the load."""

    def __init__(self, options: SoakOptions) -> None:
        self._options = options
        self._endpoint = Endpoint.parse(options.url)
        self._rng = random.Random(options.seed)
        self._prefixes = [self._words(options.max_prompt_words // 2) for _ in range(4)]
        self._takes_priorities = False
        self.report = SoakReport()

    async def run(self) -> SoakReport:
        before = await self._status()
        self._takes_priorities = await self._server_takes_priorities()
        processes = self._server_processes()
        started_s = time.monotonic()
        watching = asyncio.create_task(self._watch_memory(processes, started_s))
        try:
            await asyncio.gather(
                *(
                    self._ask_on(started_s + self._options.duration)
                    for _ in range(self._options.concurrency)
                )
            )
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await self._check_server(before)
        self._check_memory()
        self._check_log()
        return self.report

    # ---- load --------------------------------------------------------------------------------

    async def _ask_on(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            outcome = await self._ask_once()
            self.report.requests[outcome] += 1
            if outcome == "refused":
                await asyncio.sleep(0.2)

    async def _ask_once(self) -> str:
        options, rng = self._options, self._rng
        num_samples = rng.randint(2, MAX_SAMPLES) if rng.random() < options.several_fraction else 1
        body = self._body(num_samples)
        self.report.num_samples += num_samples
        leaves_after = rng.randint(0, 12) if rng.random() < options.abort_fraction else None
        stream = _Stream(leaves_after, num_samples)
        try:
            answer = await exchange(
                self._endpoint,
                "POST",
                "/generate",
                body=json.dumps(body).encode(),
                headers=options.headers(),
                on_body=stream.take,
                timeout_s=IDLE_LIMIT_S + options.duration,
            )
        except _Left:
            return "left"
        except HttpError as error:
            return self._failed(str(error))
        if answer.status in REFUSALS:
            return "refused"
        if answer.status != 200:
            return self._failed(status_message(answer.status, bytes(stream.refusal)))
        problem = stream.problem()
        return "finished" if problem is None else self._failed(problem)

    def _failed(self, problem: str) -> str:
        if len(self.report.problems) < 20:
            self.report.problems.append(f"a request failed: {problem}")
        return "failed"

    def _body(self, num_samples: int) -> dict[str, Any]:
        rng, options = self._rng, self._options
        words = self._words(rng.randint(1, options.max_prompt_words))
        if rng.random() < 0.3:
            words = rng.choice(self._prefixes) + words[: options.max_prompt_words // 2]
        body: dict[str, Any] = {
            "text": " ".join(words),
            "stream": True,
            "priority": rng.randint(-PRIORITIES, PRIORITIES if self._takes_priorities else 0),
            "sampling_params": {
                "n": num_samples,
                "max_new_tokens": rng.randint(1, options.max_output_tokens),
                "temperature": rng.choice([0.0, 1.0]),
                "ignore_eos": rng.random() < 0.5,
            },
        }
        return body

    def _words(self, count: int) -> list[str]:
        return [self._rng.choice(WORDS) for _ in range(count)]

    # ---- checks --------------------------------------------------------------------------------

    async def _call(self, method: str, path: str, *, admin: bool = False) -> Mapping[str, Any]:
        answer = await fetch_json(
            self._endpoint,
            method,
            path,
            headers=self._options.headers(admin=admin),
            timeout_s=CALL_TIMEOUT_S,
        )
        if not isinstance(answer, dict):
            raise ConfigError(f"{path} of {self._endpoint} is not what sapwood answers")
        return answer

    async def _status(self) -> dict[str, int]:
        try:
            info = await self._call("GET", "/server_info")
            return dict(info["internal_states"][0])
        except (HttpError, KeyError) as error:
            raise ConfigError(f"{self._endpoint} is no sapwood server: {error}") from error

    async def _server_takes_priorities(self) -> bool:
        return bool((await self._call("GET", "/server_info")).get("enable_priority_scheduling"))

    async def _check_server(self, before: Mapping[str, int]) -> None:
        after = await self._until_idle()
        self.report.counters = {
            name: after[name] - before.get(name, 0)
            for name in (
                "num_arrived",
                "num_finished",
                "num_aborted",
                "num_refused",
                "num_timed_out",
                "num_retractions",
                "num_preemptions",
                "num_output_tokens",
            )
        }
        counts = self.report.counters
        ended = sum(
            counts[name] for name in ("num_finished", "num_aborted", "num_refused", "num_timed_out")
        )
        problems = self.report.problems
        if counts["num_arrived"] != ended:
            problems.append(f"{counts['num_arrived']} requests arrived but {ended} ended")
        if after["num_leased_pages"]:
            problems.append(f"{after['num_leased_pages']} pages are leased though nothing runs")
        held = after["num_free_pages"] + after["num_cached_pages"]
        if held != after["num_pages"]:
            problems.append(f"{after['num_pages'] - held} pages are neither free nor cached")
        await self._call("POST", "/flush_cache", admin=True)
        after = await self._status()
        if after["num_free_pages"] != after["num_pages"]:
            lost = after["num_pages"] - after["num_free_pages"]
            problems.append(f"{lost} pages are not free after the cache was flushed")

    async def _until_idle(self) -> dict[str, int]:
        end_s = time.monotonic() + IDLE_LIMIT_S
        while True:
            try:
                status = await self._status()
            except ConfigError:
                # The server's engine may be restarting.
                if time.monotonic() > end_s:
                    raise
                await asyncio.sleep(SAMPLE_INTERVAL_S)
                continue
            if status["num_running"] == 0 and status["num_waiting"] == 0:
                return status
            if time.monotonic() > end_s:
                self.report.problems.append(
                    f"still {status['num_running']} running and {status['num_waiting']} waiting "
                    f"{IDLE_LIMIT_S:g} s after the last request"
                )
                return status
            await asyncio.sleep(0.2)

    def _server_processes(self) -> list[psutil.Process]:
        """The server's process and its children; empty if the server is not on this machine."""
        pid = self._options.server_pid or _listener(self._endpoint)
        if pid is None:
            return []
        try:
            server = psutil.Process(pid)
            return [server, *server.children(recursive=True)]
        except psutil.Error as error:
            raise ConfigError(f"the process {pid} cannot be watched: {error}") from error

    async def _watch_memory(self, processes: list[psutil.Process], started_s: float) -> None:
        while processes:
            try:
                size = sum(process.memory_info().rss for process in processes)
            except psutil.Error as error:
                self.report.problems.append(f"a process of the server has ended: {error}")
                return
            self.report.resident_bytes.append((time.monotonic() - started_s, size))
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def _check_memory(self) -> None:
        settled = [
            size for at_s, size in self.report.resident_bytes if at_s >= self._options.settle_time
        ]
        num_compared = len(settled) // 5
        if num_compared == 0:
            return
        first = statistics.median(settled[:num_compared])
        last = statistics.median(settled[-num_compared:])
        if last > first * (1 + self._options.max_memory_growth):
            self.report.problems.append(
                f"resident memory grew from {first / 2**20:.0f} to {last / 2**20:.0f} MiB"
            )

    def _check_log(self) -> None:
        if self._options.log_file is None:
            return
        try:
            text = Path(self._options.log_file).read_text("utf-8", "replace")
        except OSError as error:
            raise ConfigError(f"--log-file cannot be read: {error}") from error
        if "Traceback (most recent call last)" in text:
            self.report.problems.append(f"{self._options.log_file} has a stack trace")


class _Stream:
    """Reads one answer; some readers leave after a number of events."""

    def __init__(self, leaves_after: int | None, num_samples: int) -> None:
        self._leaves_after = leaves_after
        self._num_samples = num_samples
        self._events = SseParser()
        self._num_events = 0
        self._finished: set[int] = set()
        self._error: str | None = None
        self._is_done = False
        self.refusal = bytearray()

    def take(self, parser: ResponseParser, data: bytes) -> None:
        if parser.status != 200:
            self.refusal += data
            return
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self._is_done = True
                continue
            self._num_events += 1
            value = json.loads(event)
            if "error" in value:
                self._error = str(value["error"])
            elif value["meta_info"]["finish_reason"] is not None:
                self._finished.add(value.get("index", 0))
        if self._leaves_after is not None and self._num_events >= self._leaves_after:
            raise _Left

    def problem(self) -> str | None:
        if self._error is not None:
            return self._error
        if not self._is_done or len(self._finished) != self._num_samples:
            return f"{len(self._finished)} of {self._num_samples} samples ended in a whole stream"
        return None


def _listener(endpoint: Endpoint) -> int | None:
    """The process on this machine that listens on the port; None if it is not visible."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.pid is not None
        if listens and connection.laddr and connection.laddr.port == endpoint.port:
            return connection.pid
    return None
