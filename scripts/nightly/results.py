"""What a run found, as a file of JSON: one per run, never changed afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """
    lacks    what the machine has not, so that the suite did not run
    failed   tests that failed, and failed again each time
    flaky    test -> (times it failed, times it ran): it did both
    slowest  (seconds, test)
    """

    name: str
    seconds: float = 0.0
    num_passed: int = 0
    num_skipped: int = 0
    lacks: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    flaky: dict[str, tuple[int, int]] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    broken: str | None = None

    @property
    def is_good(self) -> bool:
        return not (self.failed or self.flaky or self.broken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of one model with one variant."""

    measure: str
    model: str
    variant: str
    name: str
    unit: str
    value: float
    higher_is_better: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """environment: of `sapwood.bench.environment`, which has the commit and the time"""

    environment: dict[str, Any]
    suites: list[SuiteResult] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    """Measure, model and variant -> why there is no figure."""

    @property
    def is_good(self) -> bool:
        return not self.broken and all(suite.is_good for suite in self.suites)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        when = "".join(letter for letter in self.environment["date"][:19] if letter not in "-:")
        path = folder / f"{when}-{(self.environment['commit'] or 'unknown').rstrip('+')}.json"
        content = {"schema": SCHEMA, **asdict(self)}
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Results:
        content = json.loads(path.read_text("utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ValueError(f"{path} is of another version of this script")
        return cls(
            environment=content["environment"],
            suites=[SuiteResult(**one) for one in content["suites"]],
            figures=[Figure(**one) for one in content["figures"]],
            broken=content["broken"],
        )


def read_all(folder: Path) -> list[Results]:
    """All runs of a folder, the oldest first."""
    found = [Results.read(path) for path in folder.glob("*.json")]
    return sorted(found, key=lambda one: str(one.environment["date"]))


def figures_of(report: Mapping[str, Any], measure: str, model: str, variant: str) -> list[Figure]:
    """The figures of a JSON file of `sapwood bench offline` or `perplexity`."""

    def figure(name: str, unit: str, value: float, *, higher: bool) -> Figure:
        return Figure(
            measure=measure,
            model=model,
            variant=variant,
            name=name,
            unit=unit,
            value=value,
            higher_is_better=higher,
        )

    if report["kind"] == "perplexity":
        return [figure("perplexity", "", report["perplexity"], higher=False)]
    found = []
    for one in report["workloads"]:
        headline = one["headline"]
        found.append(
            figure(
                f"{one['workload']['name']}: {headline['label']}",
                headline["unit"],
                one["figures"][headline["metric"]]["median"],
                higher=headline["higher_is_better"],
            )
        )
    return found
