"""What there is to run and to measure, and what each needs: tests/suites.toml."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import psutil

WHEN = ("change", "nightly", "weekly")


class RegistryError(Exception):
    """The file of suites does not say what it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A set of tests.

    pytest   arguments
    when     occasions on which it runs, of WHEN
    needs    what the machine must have, see `lacks`
    minutes  about how long it takes on two cores
    """

    name: str
    about: str
    pytest: Sequence[str]
    when: Sequence[str]
    minutes: int
    needs: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A `sapwood` command that writes its figures as JSON, for each model with each variant."""

    name: str
    about: str
    command: Sequence[str]
    models: Sequence[str]
    when: Sequence[str]
    minutes: int
    needs: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One model with one variant of a measure, and all arguments of `sapwood`."""

    measure: str
    model: str
    variant: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Suites:
    suites: tuple[Suite, ...]
    measures: tuple[Measure, ...]
    variants: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Suites:
        """RegistryError if an entry lacks something, has something unknown, or a name is double."""
        content = tomllib.loads(path.read_text("utf-8"))
        suites = tuple(_made(Suite, one) for one in content.get("suite", ()))
        measures = tuple(_made(Measure, one) for one in content.get("measure", ()))
        names = [one.name for one in (*suites, *measures)]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise RegistryError(f"{path} has {', '.join(doubles)} twice")
        for one in (*suites, *measures):
            if unknown := sorted(set(one.when) - set(WHEN)):
                raise RegistryError(f"{one.name} runs {unknown[0]}, which is none of {WHEN}")
        return cls(suites, measures, content.get("variants", {}))

    def cases(self, measure: Measure) -> list[Case]:
        return [
            Case(
                measure.name,
                model,
                variant,
                (*measure.command, "--model", model, *self.variants[variant]),
            )
            for model, variant in product(measure.models, self.variants)
        ]


def _made(kind: Callable[..., Any], entry: dict[str, Any]) -> Any:
    try:
        return kind(**entry)
    except TypeError as error:
        raise RegistryError(f"the entry {entry.get('name', entry)}: {error}") from error


def lacks(needs: Sequence[str]) -> list[str]:
    """Which of these this machine does not have: "gpu", "cpu:amx_int8", "command:chromium",
    "package:ray", "memory:16" (GiB). RegistryError for any other kind."""
    return [need for need in needs if not _has(*need.partition(":")[::2])]


def _has(kind: str, name: str) -> bool:
    match kind:
        case "gpu":
            import torch

            return torch.cuda.is_available()
        case "cpu":
            return name in cpu_flags()
        case "command":
            return shutil.which(name) is not None
        case "package":
            return find_spec(name) is not None
        case "memory":
            return psutil.virtual_memory().total >= float(name) * 2**30
    raise RegistryError(f"nobody knows whether a machine has {kind!r}")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Features of the processor as Linux names them; none are known elsewhere."""
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text("utf-8").splitlines():
        title, _, value = line.partition(":")
        if title.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
