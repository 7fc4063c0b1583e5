"""The workloads of comparisons, and workloads that are made of options.

The presets are the ones of docs/benchmarking.md: a single stream, a prefill, a full batch, and a
batch on one long prefix, cold and primed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.bench.workloads.workload import (
    DECODE_RATE,
    OUTPUT_RATE,
    PREFILL_RATE,
    WALL_TIME,
    FixedLengths,
    RandomLengths,
    Shape,
    SharedPrefix,
    WorkloadSpec,
)
from sapwood.schema.config.options import option


def _shared(*, primed: bool) -> SharedPrefix:
    return SharedPrefix(
        prefix_groups=1,
        requests_per_group=32,
        prefix_tokens=1024,
        suffix_tokens=32,
        output_tokens=32,
        primed=primed,
    )


_PRESETS = (
    WorkloadSpec(
        name="a",
        title="single stream, 128 prompt + 256 output tokens",
        shape=FixedLengths(num_requests=1, prompt_tokens=128, output_tokens=256),
        headline=DECODE_RATE,
    ),
    WorkloadSpec(
        name="b",
        title="prefill of 1,024 prompt tokens, 1 output token",
        shape=FixedLengths(num_requests=1, prompt_tokens=1024, output_tokens=1),
        headline=PREFILL_RATE,
    ),
    WorkloadSpec(
        name="c",
        title="32 requests at once, 128 prompt + 128 output tokens",
        shape=FixedLengths(num_requests=32, prompt_tokens=128, output_tokens=128),
        headline=OUTPUT_RATE,
    ),
    WorkloadSpec(
        name="d",
        title="32 requests on one cold prefix of 1,024, 32 more prompt + 32 output tokens",
        shape=_shared(primed=False),
        headline=WALL_TIME,
    ),
    WorkloadSpec(
        name="e",
        title="16 requests at once, 64 prompt + 64 output tokens",
        shape=FixedLengths(num_requests=16, prompt_tokens=64, output_tokens=64),
        headline=OUTPUT_RATE,
    ),
    WorkloadSpec(
        name="w",
        title="as d, but the prefix is primed by the first request; both phases are timed",
        shape=_shared(primed=True),
        headline=WALL_TIME,
    ),
)
PRESETS: Mapping[str, WorkloadSpec] = {spec.name: spec for spec in _PRESETS}


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of workload that is made of options: its shape, its options and their defaults."""

    title: str
    shape: Callable[..., Shape]
    defaults: Mapping[str, Any]


_KINDS: Mapping[str, _Kind] = {
    "fixed": _Kind(
        "requests of fixed lengths",
        FixedLengths,
        {"num_requests": 32, "prompt_tokens": 128, "output_tokens": 128},
    ),
    "random": _Kind(
        "requests of random lengths",
        RandomLengths,
        {"num_requests": 32, "prompt_tokens": 1024, "output_tokens": 128, "min_ratio": 0.1},
    ),
    "shared-prefix": _Kind(
        "groups of requests on shared prefixes",
        SharedPrefix,
        {
            "prefix_groups": 4,
            "requests_per_group": 8,
            "prefix_tokens": 1024,
            "suffix_tokens": 32,
            "output_tokens": 32,
            "primed": False,
        },
    ),
}
WORKLOAD_NAMES = (*_KINDS, *PRESETS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """The workloads to run. An option that a named workload does not have is an error."""

    workload: str = option(
        "fixed",
        "Comma-separated workloads: fixed, random or shared-prefix, made of the options below, or "
        "the presets " + "; ".join(f"{spec.name} ({spec.title})" for spec in _PRESETS) + ".",
    )
    num_requests: int | None = option(
        None, "Requests of fixed and random; default: 32.", unit="requests"
    )
    prompt_tokens: int | None = option(
        None,
        "Prompt length of fixed (default: 128); greatest of random (default: 1024).",
        unit="tokens",
    )
    output_tokens: int | None = option(
        None,
        "Output length of fixed (default: 128) and shared-prefix (default: 32); greatest of random "
        "(default: 128).",
        unit="tokens",
    )
    min_ratio: float | None = option(
        None, "The least length of random, as a share of the greatest; default: 0.1."
    )
    prefix_groups: int | None = option(
        None, "Different prefixes of shared-prefix; default: 4.", unit="groups"
    )
    requests_per_group: int | None = option(
        None, "Requests on each prefix of shared-prefix; default: 8.", unit="requests"
    )
    prefix_tokens: int | None = option(
        None, "Length of each prefix of shared-prefix; default: 1024.", unit="tokens"
    )
    suffix_tokens: int | None = option(
        None, "Prompt tokens after the prefix of shared-prefix; default: 32.", unit="tokens"
    )
    primed: bool | None = option(
        None, "One request of each prefix of shared-prefix runs before the others."
    )
    seed: int = option(0, "Seed of the prompts, the random lengths and the arrivals.")

    def __post_init__(self) -> None:
        self.specs()

    def specs(self) -> list[WorkloadSpec]:
        """The named workloads; ConfigError for an unknown one, or an option it does not take."""
        names = [name.strip() for name in self.workload.split(",") if name.strip()]
        if not names:
            raise ConfigError(f"--workload names none; known: {', '.join(WORKLOAD_NAMES)}")
        return [self._spec(name) for name in names]

    def _spec(self, name: str) -> WorkloadSpec:
        given = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("workload", "seed") and getattr(self, field.name) is not None
        }
        kind = _KINDS.get(name)
        if kind is None and name not in PRESETS:
            raise ConfigError(f"unknown workload {name!r}; known: {', '.join(WORKLOAD_NAMES)}")
        refused = [key for key in given if kind is None or key not in kind.defaults]
        if refused:
            flags = ", ".join("--" + key.replace("_", "-") for key in refused)
            takers = [other for other, known in _KINDS.items() if set(refused) <= {*known.defaults}]
            hint = f"use --workload {' or '.join(takers)}" if takers else "leave them out"
            raise ConfigError(f"workload {name} does not take {flags}; {hint}")
        if kind is None:
            return PRESETS[name]
        shape = kind.shape(**{**kind.defaults, **given})
        return WorkloadSpec(name=name, title=kind.title, shape=shape)
