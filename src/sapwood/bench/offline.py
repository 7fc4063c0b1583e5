"""Throughput without a server: a workload through an engine in this process, several times.

The measuring is the same for sapwood and for its peers: prompts of token ids go in, greedy outputs
of exactly the asked lengths come out, and the time between is the result. Each repeat has prompts
of its own, so that nothing cached serves the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sapwood.base.clock import Clock, MonotonicClock
from sapwood.base.errors import ConfigError
from sapwood.bench.distribution import Spread
from sapwood.bench.workloads.vocabulary import Vocabulary
from sapwood.bench.workloads.workload import FixedLengths, Workload, WorkloadSpec
from sapwood.schema.config.options import option

RATES = ("wall_s", "output_tok_s", "prompt_tok_s", "total_tok_s", "decode_tok_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """How often an offline workload is run."""

    repeats: int = option(3, "Timed runs of each workload; the median is quoted.", unit="runs")
    num_warmups: int = option(
        1, "Runs of each workload before, with other prompts, not counted.", unit="runs"
    )

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats} but must be >= 1")
        if self.num_warmups < 0:
            raise ConfigError(f"--num-warmups is {self.num_warmups} but must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The result of one prompt.

    num_cached_tokens  prompt tokens that came from a prefix cache
    """

    num_output_tokens: int
    num_cached_tokens: int = 0


class TokenGenerator(Protocol):
    """An engine under test."""

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lengths: Sequence[int]
    ) -> Sequence[Generated]:
        """The greedy output of every prompt, in the order of the prompts. Blocks until all end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The times of a run: seconds of each phase, and values for each request."""

    phase_s: tuple[float, ...]
    num_output_tokens: tuple[int, ...]
    num_cached_tokens: tuple[int, ...]

    @property
    def wall_s(self) -> float:
        return sum(self.phase_s)


Runner = Callable[[Workload], RunResult]
"""Runs a workload, in this process or another."""


def run_phases(generator: TokenGenerator, workload: Workload, clock: Clock) -> RunResult:
    """Run one phase after the other, all requests of a phase at once."""
    phase_s = []
    generated: list[Generated] = []
    for phase in workload.phases:
        # Lists are made before the clock starts, because making them is not the engine's work.
        prompts = [_ids(request.prompt) for request in phase]
        lengths = [request.num_output_tokens for request in phase]
        start_s = clock.now_s()
        outputs = generator.generate(prompts, lengths)
        phase_s.append(clock.now_s() - start_s)
        if len(outputs) != len(prompts):
            raise RuntimeError(f"{len(prompts)} prompts came back as {len(outputs)} outputs")
        generated += outputs
    return RunResult(
        phase_s=tuple(phase_s),
        num_output_tokens=tuple(output.num_output_tokens for output in generated),
        num_cached_tokens=tuple(output.num_cached_tokens for output in generated),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One timed run of a workload.

    probe_s  seconds that a single stream took for one output token; None for other workloads
    """

    phase_s: tuple[float, ...]
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    probe_s: float | None
    warnings: tuple[str, ...] = ()

    @property
    def wall_s(self) -> float:
        return sum(self.phase_s)

    @property
    def output_tok_s(self) -> float:
        return self.num_output_tokens / self.wall_s

    @property
    def prompt_tok_s(self) -> float:
        return self.num_prompt_tokens / self.wall_s

    @property
    def total_tok_s(self) -> float:
        return (self.num_prompt_tokens + self.num_output_tokens) / self.wall_s

    @property
    def decode_tok_s(self) -> float | None:
        """Output tokens per second after the first token; None without a probe."""
        if self.probe_s is None or self.probe_s >= self.wall_s:
            return None
        return (self.num_output_tokens - 1) / (self.wall_s - self.probe_s)

    def figure(self, metric: str) -> float | None:
        value: float | None = getattr(self, metric)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineResult:
    """All repeats of one workload."""

    workload: dict[str, Any]
    spec: WorkloadSpec
    repeats: tuple[Repeat, ...]

    @property
    def figures(self) -> dict[str, Spread]:
        """Metric -> its spread over the repeats; metrics without a value are left out."""
        spreads = {}
        for metric in RATES:
            values = [repeat.figure(metric) for repeat in self.repeats]
            found = [value for value in values if value is not None]
            if found:
                spreads[metric] = Spread.of(found)
        return spreads

    @property
    def headline_values(self) -> list[float]:
        """The headline's values; a repeat whose probe was slower than its run has no value."""
        values = [repeat.figure(self.spec.headline.metric) for repeat in self.repeats]
        return [value for value in values if value is not None]

    @property
    def warnings(self) -> list[str]:
        return list(dict.fromkeys(text for repeat in self.repeats for text in repeat.warnings))

    def to_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "headline": self.spec.headline,
            "figures": self.figures,
            "repeats": self.repeats,
            "warnings": self.warnings,
        }


def measure_repeat(
    run: Runner, spec: WorkloadSpec, vocabulary: Vocabulary, *, seed: int, repeat: int
) -> Repeat:
    """One timed run. A single stream runs again with another prompt, for one token only."""
    workload = spec.generate(vocabulary, seed=seed, repeat=repeat)
    result = run(workload)
    probe = probe_spec(spec)
    probe_s = None
    if probe is not None:
        # Another prompt: the first one's prefix is cached by now, which would flatter the decode.
        probe_s = run(probe.generate(vocabulary, seed=seed, repeat=f"{repeat}/probe")).wall_s
    requests = workload.requests
    return Repeat(
        phase_s=result.phase_s,
        num_requests=len(requests),
        num_prompt_tokens=sum(request.num_prompt_tokens for request in requests),
        num_output_tokens=sum(result.num_output_tokens),
        num_cached_tokens=sum(result.num_cached_tokens),
        probe_s=probe_s,
        warnings=tuple(_length_warnings(workload, result)),
    )


def probe_spec(spec: WorkloadSpec) -> WorkloadSpec | None:
    """For a single stream: the workload with one output token, which measures the prefill."""
    shape = spec.shape
    if not isinstance(shape, FixedLengths) or shape.num_requests > 1 or shape.output_tokens < 2:
        return None
    return replace(spec, shape=replace(shape, output_tokens=1))


def measure_workload(
    run: Runner,
    spec: WorkloadSpec,
    vocabulary: Vocabulary,
    options: OfflineOptions,
    *,
    seed: int,
    on_repeat: Callable[[Repeat], None] = lambda _: None,
) -> OfflineResult:
    """Warm up, then run the repeats; `on_repeat` is called after each."""
    for index in range(options.num_warmups):
        run(spec.generate(vocabulary, seed=seed, repeat=f"warm-up/{index}"))
    repeats = []
    for index in range(options.repeats):
        repeat = measure_repeat(run, spec, vocabulary, seed=seed, repeat=index)
        on_repeat(repeat)
        repeats.append(repeat)
    summary = spec.generate(vocabulary, seed=seed, repeat=0).summary()
    return OfflineResult(workload=summary, spec=spec, repeats=tuple(repeats))


def in_process(generator: TokenGenerator, clock: Clock | None = None) -> Runner:
    """A runner for an engine in this process."""
    used_clock = clock or MonotonicClock()
    return lambda workload: run_phases(generator, workload, used_clock)


def _length_warnings(workload: Workload, result: RunResult) -> list[str]:
    asked = [request.num_output_tokens for request in workload.requests]
    wrong = [
        (got, wanted)
        for got, wanted in zip(result.num_output_tokens, asked, strict=True)
        if got != wanted
    ]
    if not wrong:
        return []
    got, wanted = wrong[0]
    return [
        f"{len(wrong)} of {len(asked)} outputs of workload {workload.spec.name} do not have the "
        f"length asked for (the first: {got} tokens instead of {wanted})"
    ]


def _ids(prompt: object) -> list[int]:
    if not isinstance(prompt, tuple):
        raise TypeError("an offline workload has prompts of token ids")
    return list(prompt)
