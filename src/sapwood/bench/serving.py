"""Load on a running server, over HTTP, with one stream per request.

Works against any server with OpenAI's completions or chat API, or the native /generate. Imports no
torch. Requests of a phase start at the given rate (all at once, or as a Poisson process) and at
most `max_concurrency` are in flight; the time of a request starts when it is sent, not while it
waits for its turn in the client.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapwood.base.clock import Clock, MonotonicClock
from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.bench.dialects import DIALECTS, Asked, Dialect, Usage
from sapwood.bench.http_stream import (
    Endpoint,
    HttpError,
    ResponseParser,
    SseParser,
    exchange,
    fetch_json,
    status_message,
)
from sapwood.bench.timeline import RequestTimeline, ServingMetrics, compute_metrics
from sapwood.bench.workloads.vocabulary import WORDS, TokenVocabulary
from sapwood.bench.workloads.workload import BenchRequest, Phase, Workload
from sapwood.schema.config.options import option

APIS = ("completions", "chat", "native")
PROMPT_KINDS = ("ids", "text")
DONE = b"[DONE]"
MAX_ERROR_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How a server is measured."""

    url: str = option("http://127.0.0.1:30000", "Base URL of the server, without /v1.")
    api: str = option("completions", "Wire format to speak.", choices=APIS)
    model: str | None = option(
        None, "Model name to send; default: the first that /v1/models lists."
    )
    prompts: str | None = option(
        None,
        "Send prompts as token ids, whose lengths are exact, or as text; default: ids, and text "
        "for chat, which takes nothing else.",
        choices=PROMPT_KINDS,
    )
    tokenizer: str | None = option(
        None,
        "Model by name or path, or a tokenizer.json, to draw token ids from; default: the server "
        "is asked to tokenize common words, or its model is looked for on this machine.",
    )
    request_rate: float = option(
        float("inf"),
        "Requests sent per second, as a Poisson process; inf: all at once.",
        unit="requests/second",
    )
    max_concurrency: int | None = option(
        None, "Requests in flight at most; default: no limit.", unit="requests"
    )
    num_warmups: int = option(
        2, "Requests sent before, with other prompts, and not counted.", unit="requests"
    )
    ignore_eos: bool = option(
        True,
        "Force the output length with ignore_eos and min_tokens, which OpenAI itself refuses.",
    )
    temperature: float = option(0.0, "Sampling temperature; 0: greedy.")
    extra_body: str | None = option(None, "JSON object of further fields for each request.")
    api_key: str | None = option(None, "Sent as a bearer token.")
    request_timeout: float = option(
        600.0, "A request without a whole answer after this long has failed.", unit="seconds"
    )

    def __post_init__(self) -> None:
        Endpoint.parse(self.url)
        if not self.request_rate > 0:
            raise ConfigError(f"--request-rate is {self.request_rate} but must be > 0, or inf")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency is {self.max_concurrency} but must be >= 1")
        if self.num_warmups < 0:
            raise ConfigError(f"--num-warmups is {self.num_warmups} but must be >= 0")
        if self.request_timeout <= 0:
            raise ConfigError(f"--request-timeout is {self.request_timeout} but must be > 0")
        if self.temperature < 0:
            raise ConfigError(f"--temperature is {self.temperature} but must be >= 0")
        if self.prompts == "ids" and self.api == "chat":
            raise ConfigError("--api chat takes no token ids; leave --prompts out")
        if self.tokenizer is not None and self.prompts_as_text:
            raise ConfigError("--tokenizer has no use for text prompts; use --prompts ids")
        self.extra_fields()

    @property
    def prompts_as_text(self) -> bool:
        return self.prompts == "text" or self.api == "chat"

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    def extra_fields(self) -> Mapping[str, Any]:
        if self.extra_body is None:
            return {}
        try:
            value = json.loads(self.extra_body)
        except ValueError as error:
            raise ConfigError(f"--extra-body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError("--extra-body must be a JSON object")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and the form of the requests to it."""

    endpoint: Endpoint
    dialect: Callable[[], Dialect]
    asked: Asked
    headers: Mapping[str, str]
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How fast requests start; `rate` is in requests per second, and inf for all at once."""

    rate: float = float("inf")
    max_concurrency: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRun:
    """One workload on one server."""

    workload: Workload
    timelines: tuple[RequestTimeline, ...]
    metrics: ServingMetrics


class _Reading:
    """One request while its answer arrives."""

    def __init__(self, dialect: Dialect, clock: Clock) -> None:
        self._dialect = dialect
        self._clock = clock
        self._sse = SseParser()
        self._other = bytearray()
        self.token_s: list[float] = []
        self.first_event_s: float | None = None
        self.usage: Usage | None = None
        self.finish: str | None = None
        self.done = False

    def on_body(self, parser: ResponseParser, data: bytes) -> None:
        now_s = self._clock.now_s()
        is_stream = parser.headers.get("content-type", "").startswith("text/event-stream")
        if parser.status != 200 or not is_stream:
            self._other += data[: MAX_ERROR_BYTES - len(self._other)]
            return
        for payload in self._sse.feed(data):
            self._on_event(payload, now_s)

    def _on_event(self, payload: bytes, now_s: float) -> None:
        if payload == DONE:
            self.done = True
            return
        event = self._dialect.read(payload)
        if self.first_event_s is None:
            self.first_event_s = now_s
        if event.has_token:
            self.token_s.append(now_s)
        if event.usage is not None:
            self.usage = event.usage
        if event.finish is not None:
            self.finish = event.finish

    def check(self, parser: ResponseParser) -> None:
        """Raises HttpError unless the answer was a complete stream."""
        if parser.status != 200:
            raise HttpError(status_message(parser.status, bytes(self._other)))
        if self.first_event_s is None:
            kind = parser.headers.get("content-type", "no content-type")
            raise HttpError(f"the answer is not a stream of events but {kind}")
        if self.finish is None and not self.done:
            raise HttpError("the stream ended before the request had finished")

    def arrivals_s(self) -> list[float]:
        """The times of events with tokens; for a stream without any text, its first event's."""
        if self.token_s or self.finish is None or self.first_event_s is None:
            return self.token_s
        return [self.first_event_s]


async def send_request(
    target: Target, request: BenchRequest, *, index: int, zero_s: float, clock: Clock
) -> RequestTimeline:
    """Send one request and read its stream to the end. Failures become the timeline's `error`."""
    dialect = target.dialect()
    reading = _Reading(dialect, clock)
    body = json.dumps(dialect.body(request, target.asked)).encode()
    sent_s = clock.now_s()
    error = None
    try:
        parser = await exchange(
            target.endpoint,
            "POST",
            dialect.path,
            body=body,
            headers={"accept": "text/event-stream", **target.headers},
            on_body=reading.on_body,
            timeout_s=target.timeout_s,
        )
        reading.check(parser)
    except HttpError as failure:
        error = str(failure)
    end_s = clock.now_s()
    usage = reading.usage or Usage()
    arrivals_s = reading.arrivals_s()
    counted = usage.num_output_tokens
    return RequestTimeline(
        index=index,
        asked_prompt_tokens=request.num_prompt_tokens,
        asked_output_tokens=request.num_output_tokens,
        sent_s=sent_s - zero_s,
        token_s=tuple(arrival_s - zero_s for arrival_s in arrivals_s),
        end_s=end_s - zero_s,
        num_prompt_tokens=usage.num_prompt_tokens,
        num_output_tokens=len(arrivals_s) if counted is None else counted,
        num_cached_tokens=usage.num_cached_tokens,
        counted_by_server=counted is not None,
        finish=reading.finish,
        error=error,
    )


async def run_workload(
    target: Target, workload: Workload, load: Load, clock: Clock | None = None
) -> ServingRun:
    """Every request of the workload, phase after phase."""
    clock = clock or MonotonicClock()
    arrivals = random.Random(f"arrivals/{load.seed}")
    zero_s = clock.now_s()
    timelines: list[RequestTimeline] = []
    for phase in workload.phases:
        timelines += await _run_phase(
            target, phase, load, arrivals, first_index=len(timelines), zero_s=zero_s, clock=clock
        )
    exact = not isinstance(workload.requests[0].prompt, str)
    return ServingRun(
        workload=workload,
        timelines=tuple(timelines),
        metrics=compute_metrics(
            timelines,
            exact_prompts=exact,
            # All text prompts begin with the same part of the chat template.
            unrelated_prompts=exact and not workload.spec.shape.shares_prompts,
        ),
    )


async def _run_phase(
    target: Target,
    phase: Phase,
    load: Load,
    arrivals: random.Random,
    *,
    first_index: int,
    zero_s: float,
    clock: Clock,
) -> list[RequestTimeline]:
    turns = asyncio.Semaphore(load.max_concurrency or len(phase))

    async def send(index: int, request: BenchRequest, delay_s: float) -> RequestTimeline:
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        async with turns:
            return await send_request(target, request, index=index, zero_s=zero_s, clock=clock)

    delays_s = arrival_delays_s(load.rate, len(phase), arrivals)
    return await asyncio.gather(
        *(
            send(first_index + position, request, delay_s)
            for position, (request, delay_s) in enumerate(zip(phase, delays_s, strict=True))
        )
    )


def arrival_delays_s(rate: float, count: int, rng: random.Random) -> list[float]:
    """Seconds from a phase's start to each request of a Poisson process; zeros for rate inf."""
    if rate == float("inf"):
        return [0.0] * count
    delays_s = [0.0]
    while len(delays_s) < count:
        delays_s.append(delays_s[-1] + rng.expovariate(rate))
    return delays_s


async def warm_up(target: Target, requests: Sequence[BenchRequest]) -> None:
    """Send requests that are not counted; EngineUnavailable if a request fails."""
    clock = MonotonicClock()
    for index, request in enumerate(requests):
        timeline = await send_request(target, request, index=index, zero_s=0.0, clock=clock)
        if timeline.error is not None:
            raise EngineUnavailable(
                f"the warm-up request to {target.endpoint} failed: {timeline.error}"
            )


async def connect(options: ServingOptions) -> Target:
    """The server that the options name, with the name of its model."""
    endpoint = Endpoint.parse(options.url)
    model = options.model
    if model is None and options.api != "native":
        model = await first_model_of(endpoint, options.headers)
    return Target(
        endpoint=endpoint,
        dialect=DIALECTS.get(options.api),
        asked=Asked(
            model=model,
            temperature=options.temperature,
            ignore_eos=options.ignore_eos,
            extra=options.extra_fields(),
        ),
        headers=options.headers,
        timeout_s=options.request_timeout,
    )


async def first_model(target: Target) -> str:
    """The first model that the server lists; EngineUnavailable if it lists none."""
    return await first_model_of(target.endpoint, target.headers)


async def first_model_of(endpoint: Endpoint, headers: Mapping[str, str]) -> str:
    """The first model that a server lists; EngineUnavailable if it lists none."""
    try:
        answer = await fetch_json(endpoint, "GET", "/v1/models", headers=headers, timeout_s=30.0)
    except HttpError as error:
        raise EngineUnavailable(
            f"{endpoint}/v1/models did not answer: {error}; start the server, or name the model "
            "with --model"
        ) from error
    models = answer.get("data") if isinstance(answer, dict) else None
    if not models or not isinstance(models[0], dict) or "id" not in models[0]:
        raise EngineUnavailable(f"{endpoint}/v1/models lists no model; name one with --model")
    return str(models[0]["id"])


async def server_vocabulary(target: Target) -> TokenVocabulary:
    """Ordinary token ids, from the server's own tokenizer.

    sapwood, SGLang and vLLM tokenize a "prompt", llama.cpp tokenizes "content". ConfigError if the
    server does neither.
    """
    text = " ".join(WORDS)
    bodies: list[dict[str, Any]] = [
        {"prompt": text, "add_special_tokens": False},
        {"content": text, "add_special": False},
    ]
    if target.asked.model is not None:
        bodies[0]["model"] = target.asked.model
    refusals = []
    for body in bodies:
        try:
            answer = await fetch_json(
                target.endpoint,
                "POST",
                "/tokenize",
                body=body,
                headers=target.headers,
                timeout_s=30.0,
            )
        except HttpError as error:
            refusals.append(str(error))
            continue
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if isinstance(tokens, list) and tokens and all(isinstance(t, int) for t in tokens):
            return TokenVocabulary(tuple(sorted(set(tokens))))
        refusals.append("the answer has no tokens")
    raise ConfigError(
        f"{target.endpoint}/tokenize gives no token ids ({'; '.join(refusals)}); name the model's "
        "tokenizer with --tokenizer, or use --prompts text"
    )
