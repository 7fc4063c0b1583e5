"""The requests of a benchmark, and the shapes of workloads."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from sapwood.base.errors import ConfigError
from sapwood.bench.workloads.vocabulary import Prompt, Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One prompt and the exact number of output tokens that it asks for.

    num_prompt_tokens  exact for a prompt of token ids, estimated for a prompt of words
    """

    prompt: Prompt
    num_prompt_tokens: int
    num_output_tokens: int


Phase = tuple[BenchRequest, ...]
"""Requests that are sent together; the next phase starts when the last of these has ended."""


class Shape(Protocol):
    """The lengths of a workload's requests; a frozen dataclass of plain numbers."""

    @property
    def shares_prompts(self) -> bool:
        """Whether prompts have common prefixes on purpose, for a prefix cache to find."""
        ...

    def phases(self, vocabulary: Vocabulary, rng: random.Random) -> tuple[Phase, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedLengths:
    """Every prompt has the same length, and so has every output."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int

    shares_prompts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _at_least_one(self)

    def phases(self, vocabulary: Vocabulary, rng: random.Random) -> tuple[Phase, ...]:
        requests = [
            _request(vocabulary, vocabulary.draw(rng, self.prompt_tokens), self.output_tokens)
            for _ in range(self.num_requests)
        ]
        return (tuple(requests),)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLengths:
    """Lengths drawn evenly from `min_ratio` of the greatest length up to the greatest."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    min_ratio: float

    shares_prompts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _at_least_one(self, skip="min_ratio")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise ConfigError(f"--min-ratio is {self.min_ratio} but must be from 0 to 1")

    def phases(self, vocabulary: Vocabulary, rng: random.Random) -> tuple[Phase, ...]:
        requests = []
        for _ in range(self.num_requests):
            prompt = vocabulary.draw(rng, self._length(rng, self.prompt_tokens))
            requests.append(_request(vocabulary, prompt, self._length(rng, self.output_tokens)))
        return (tuple(requests),)

    def _length(self, rng: random.Random, greatest: int) -> int:
        return rng.randint(max(1, round(greatest * self.min_ratio)), greatest)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """Groups of requests whose prompts begin with the same tokens.

    primed  the first request of each group runs alone, in a phase of its own, before the others;
            the requests are the same either way, so the two can be compared
    """

    prefix_groups: int
    requests_per_group: int
    prefix_tokens: int
    suffix_tokens: int
    output_tokens: int
    primed: bool

    shares_prompts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _at_least_one(self, skip="primed")
        if self.primed and self.requests_per_group < 2:
            raise ConfigError(
                "a primed prefix needs --requests-per-group of at least 2: one primes, others gain"
            )

    def phases(self, vocabulary: Vocabulary, rng: random.Random) -> tuple[Phase, ...]:
        first: list[BenchRequest] = []
        others: list[BenchRequest] = []
        for _ in range(self.prefix_groups):
            prefix = vocabulary.draw(rng, self.prefix_tokens)
            for position in range(self.requests_per_group):
                prompt = prefix + vocabulary.draw(rng, self.suffix_tokens)
                request = _request(vocabulary, prompt, self.output_tokens)
                (first if position == 0 else others).append(request)
        if self.primed:
            rng.shuffle(others)
            return tuple(first), tuple(others)
        # Users of different prefixes arrive mixed, not one group after the other.
        mixed = [*first, *others]
        rng.shuffle(mixed)
        return (tuple(mixed),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The main figure of a workload.

    metric  name of a property of `offline.Repeat`
    """

    metric: str
    label: str
    unit: str
    higher_is_better: bool = True


OUTPUT_RATE = Headline(metric="output_tok_s", label="output", unit="tok/s")
DECODE_RATE = Headline(metric="decode_tok_s", label="decode", unit="tok/s")
PREFILL_RATE = Headline(metric="prompt_tok_s", label="prefill", unit="tok/s")
WALL_TIME = Headline(metric="wall_s", label="wall", unit="s", higher_is_better=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """A named shape; `generate` makes its requests."""

    name: str
    title: str
    shape: Shape
    headline: Headline = OUTPUT_RATE

    def generate(self, vocabulary: Vocabulary, *, seed: int, repeat: int | str = 0) -> Workload:
        """The same requests for the same arguments, on every machine and Python version.

        repeat  number of the repeat; each has prompts of its own, so that a cache that is filled by
                one repeat cannot serve the next
        """
        # A text seed goes through SHA-512, so that neighbouring repeats have unrelated prompts.
        rng = random.Random(f"{self.name}/{seed}/{repeat}")
        return Workload(spec=self, seed=seed, phases=self.shape.phases(vocabulary, rng))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The requests of one run."""

    spec: WorkloadSpec
    seed: int
    phases: tuple[Phase, ...]

    @property
    def requests(self) -> tuple[BenchRequest, ...]:
        return tuple(request for phase in self.phases for request in phase)

    def summary(self) -> dict[str, Any]:
        """The workload in a report, as JSON."""
        requests = self.requests
        return {
            "name": self.spec.name,
            "title": self.spec.title,
            "shape": type(self.spec.shape).__name__,
            "parameters": dataclasses.asdict(self.spec.shape),  # type: ignore[call-overload]
            "seed": self.seed,
            "prompts": "text" if isinstance(requests[0].prompt, str) else "token ids",
            "phases": [len(phase) for phase in self.phases],
            "num_requests": len(requests),
            "prompt_tokens": _range([request.num_prompt_tokens for request in requests]),
            "output_tokens": _range([request.num_output_tokens for request in requests]),
        }


def _request(vocabulary: Vocabulary, units: Sequence[int], num_output_tokens: int) -> BenchRequest:
    return BenchRequest(
        prompt=vocabulary.render(units),
        num_prompt_tokens=len(units),
        num_output_tokens=num_output_tokens,
    )


def _range(lengths: Sequence[int]) -> dict[str, float]:
    return {
        "min": min(lengths),
        "mean": sum(lengths) / len(lengths),
        "max": max(lengths),
        "total": sum(lengths),
    }


def _at_least_one(shape: Any, *, skip: str = "") -> None:
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if field.name != skip and value < 1:
            raise ConfigError(f"--{field.name.replace('_', '-')} is {value} but must be >= 1")
