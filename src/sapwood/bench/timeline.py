"""The timeline of each request, and the figures that are computed from timelines.

    TTFT  time to first token    from sending the request to its first event with a token
    ITL   inter-token latency    between an event with a token and the next one of that request
    TPOT  time per output token  (last token - first token) / (output tokens - 1)
    E2E   end to end             from sending the request to the end of its answer

ITL shows stalls that TPOT averages away. An event may carry several tokens; TPOT counts tokens as
the server states them, ITL counts events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sapwood.bench.distribution import Distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimeline:
    """One request as the client saw it. Times are seconds since the start of the run.

    sent_s             when the request was sent (before the connection was made)
    token_s            arrival of each event with a token, ascending
    end_s              end of the answer, or of the attempt
    num_output_tokens  output tokens that the server counted, else the number of events
    counted_by_server  whether the server counted them
    error              why the request failed; None: it did not
    """

    index: int
    asked_prompt_tokens: int
    asked_output_tokens: int
    sent_s: float
    token_s: tuple[float, ...]
    end_s: float
    num_prompt_tokens: int | None
    num_output_tokens: int
    num_cached_tokens: int | None
    counted_by_server: bool
    finish: str | None
    error: str | None

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.sent_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        if not self.token_s or self.num_output_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_s)]

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.sent_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A message with which `count` requests failed."""

    message: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMetrics:
    """The figures of one run. Latencies are of completed requests only; failures are counted.

    duration_s    from the first request sent to the last answer's end
    input_tok_s   prompt tokens over the duration, cached ones included
    """

    num_requests: int
    num_completed: int
    num_failed: int
    failures: tuple[Failure, ...]
    duration_s: float
    request_rate: float
    input_tok_s: float
    output_tok_s: float
    total_tok_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    peak_concurrency: int
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    warnings: tuple[str, ...]


def compute_metrics(
    timelines: Sequence[RequestTimeline], *, exact_prompts: bool, unrelated_prompts: bool = False
) -> ServingMetrics:
    """Figures of one run; ValueError if it had no requests.

    exact_prompts      whether prompts were token ids; then another prompt length causes a warning
    unrelated_prompts  whether prompts share no prefix; then a prefix hit causes a warning
    """
    if not timelines:
        raise ValueError("a run needs at least one request")
    done = [timeline for timeline in timelines if timeline.error is None]
    failures = Counter(timeline.error for timeline in timelines if timeline.error is not None)
    duration_s = max(t.end_s for t in timelines) - min(t.sent_s for t in timelines)
    num_prompt_tokens = sum(
        t.asked_prompt_tokens if t.num_prompt_tokens is None else t.num_prompt_tokens for t in done
    )
    num_output_tokens = sum(t.num_output_tokens for t in done)

    def rate(amount: float) -> float:
        return amount / duration_s if duration_s > 0 else 0.0

    return ServingMetrics(
        num_requests=len(timelines),
        num_completed=len(done),
        num_failed=len(timelines) - len(done),
        failures=tuple(
            Failure(message=message, count=count) for message, count in failures.most_common()
        ),
        duration_s=duration_s,
        request_rate=rate(len(done)),
        input_tok_s=rate(num_prompt_tokens),
        output_tok_s=rate(num_output_tokens),
        total_tok_s=rate(num_prompt_tokens + num_output_tokens),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(t.num_cached_tokens or 0 for t in done),
        peak_concurrency=peak_concurrency(timelines),
        ttft_ms=_milliseconds([t.ttft_s for t in done if t.ttft_s is not None]),
        tpot_ms=_milliseconds([t.tpot_s for t in done if t.tpot_s is not None]),
        itl_ms=_milliseconds([interval for t in done for interval in t.itl_s]),
        e2e_ms=_milliseconds([t.e2e_s for t in done]),
        warnings=(
            *length_warnings(done, exact_prompts=exact_prompts),
            *(cache_warnings(done) if unrelated_prompts else ()),
        ),
    )


def peak_concurrency(timelines: Sequence[RequestTimeline]) -> int:
    """Largest number of requests in flight; a request that ends just then does not count."""
    changes = [(t.sent_s, 1) for t in timelines] + [(t.end_s, -1) for t in timelines]
    peak = current = 0
    for _, change in sorted(changes):
        current += change
        peak = max(peak, current)
    return peak


def length_warnings(done: Sequence[RequestTimeline], *, exact_prompts: bool) -> list[str]:
    """Reasons, in words, why a run's lengths differ from the workload's."""
    warnings = []
    uncounted = sum(not t.counted_by_server for t in done)
    if uncounted:
        warnings.append(
            f"{uncounted} answers came without token counts; their events were counted instead, "
            "and an event may hold several tokens"
        )
    wrong = [t for t in done if t.num_output_tokens != t.asked_output_tokens]
    if wrong:
        warnings.append(
            f"{len(wrong)} of {len(done)} outputs do not have the length asked for (the first: "
            f"{wrong[0].num_output_tokens} tokens instead of {wrong[0].asked_output_tokens}); "
            "the server may not honour ignore_eos"
        )
    other = [t for t in done if t.num_prompt_tokens not in (None, t.asked_prompt_tokens)]
    if other and exact_prompts:
        warnings.append(
            f"{len(other)} of {len(done)} prompts were counted at another length (the first: "
            f"{other[0].num_prompt_tokens} tokens instead of {other[0].asked_prompt_tokens}); "
            "the server may add tokens"
        )
    elif other:
        asked = sum(t.asked_prompt_tokens for t in other)
        counted = sum(t.num_prompt_tokens or 0 for t in other)
        warnings.append(
            f"text prompts have only about the length asked for: the server counted {counted} "
            f"tokens where {asked} were meant"
        )
    return warnings


def cache_warnings(done: Sequence[RequestTimeline]) -> list[str]:
    """Warnings about prefix hits of unrelated prompts, which flatter TTFT and throughput."""
    num_cached_tokens = sum(t.num_cached_tokens or 0 for t in done)
    if not num_cached_tokens:
        return []
    return [
        f"{num_cached_tokens} prompt tokens came from the server's cache though no two prompts "
        "share any: it has seen them before; give another --seed"
    ]


def _milliseconds(seconds: Sequence[float]) -> Distribution | None:
    return Distribution.of([value * 1e3 for value in seconds])
