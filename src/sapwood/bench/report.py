"""Results for people (tables), for programs (JSON) and for the eye (PNG)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from sapwood.base.errors import ConfigError
from sapwood.bench.distribution import Distribution, Spread
from sapwood.bench.environment import Environment
from sapwood.bench.offline import OfflineResult
from sapwood.bench.peers.compare import Comparison, PeerFacts
from sapwood.bench.serving import ServingRun
from sapwood.bench.timeline import ServingMetrics
from sapwood.bench.workloads.workload import Headline
from sapwood.schema.config.options import option

SECRET_OPTIONS = frozenset({"api_key"})
MAX_FAILURES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Where results go."""

    output_dir: str = option("bench-results", "Directory for the JSON file and the plot.")
    plot: bool = option(True, "Draw a PNG plot beside the JSON file.")


def report_stem(command: str, workloads: Sequence[str], environment: Environment) -> str:
    """A file name without its ending, made of the kind of measurement and the time."""
    when = "".join(letter for letter in environment.date[:19] if letter not in "-:")
    return f"{command}-{'-'.join(workloads)}-{when}"


def options_json(*options: Any) -> dict[str, Any]:
    """The options as JSON, without secrets; infinity, which JSON lacks, becomes a text."""
    values: dict[str, Any] = {}
    for group in options:
        for name, value in dataclasses.asdict(group).items():
            if name not in SECRET_OPTIONS:
                infinite = isinstance(value, float) and math.isinf(value)
                values[name] = "inf" if infinite else value
    return values


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """ConfigError if the directory cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error}; name another directory with --output-dir"
        ) from error


def serving_json(
    run: ServingRun, environment: Environment, options: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "kind": "serving",
        "environment": environment,
        "options": options,
        "workload": run.workload.summary(),
        "metrics": run.metrics,
        "requests": run.timelines,
    }


def offline_json(
    results: Sequence[OfflineResult], environment: Environment, options: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "kind": "offline",
        "environment": environment,
        "options": options,
        "workloads": [result.to_json() for result in results],
    }


def latency_table(metrics: ServingMetrics, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("milliseconds")
    for name in ("mean", "median", "p95", "p99", "max"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, Distribution | None]] = [
        ("TTFT", metrics.ttft_ms),
        ("TPOT", metrics.tpot_ms),
        ("ITL", metrics.itl_ms),
        ("end to end", metrics.e2e_ms),
    ]
    for name, values in rows:
        if values is None:
            table.add_row(name, *["-"] * 5)
            continue
        shown = (values.mean, values.median, values.p95, values.p99, values.maximum)
        table.add_row(name, *(f"{value:.2f}" for value in shown))
    return table


def totals_table(metrics: ServingMetrics) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("requests completed", f"{metrics.num_completed} of {metrics.num_requests}"),
        ("requests failed", str(metrics.num_failed)),
        ("duration", f"{metrics.duration_s:.2f} s"),
        ("requests", f"{metrics.request_rate:.2f} /s"),
        ("input", f"{metrics.input_tok_s:.1f} tok/s"),
        ("output", f"{metrics.output_tok_s:.1f} tok/s"),
        ("input and output", f"{metrics.total_tok_s:.1f} tok/s"),
        ("prompt tokens", f"{metrics.num_prompt_tokens} ({metrics.num_cached_tokens} cached)"),
        ("output tokens", str(metrics.num_output_tokens)),
        ("peak concurrency", str(metrics.peak_concurrency)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def serving_remarks(metrics: ServingMetrics) -> list[str]:
    """Remarks that a reader of the figures needs: failures first, then warnings."""
    shown = metrics.failures[:MAX_FAILURES_SHOWN]
    remarks = [f"{failure.count} requests failed: {failure.message}" for failure in shown]
    hidden = len(metrics.failures) - len(shown)
    if hidden:
        remarks.append(f"{hidden} further kinds of failure are in the JSON file")
    return [*remarks, *metrics.warnings]


def offline_table(results: Sequence[OfflineResult]) -> Table:
    table = Table(title=Text("medians over the repeats [min-max]"), title_justify="left")
    for name in ("workload", "headline", "wall s", "output tok/s", "total tok/s", "cached"):
        table.add_column(name, justify="left" if name == "workload" else "right")
    for result in results:
        figures = result.figures
        cached = Spread.of([repeat.num_cached_tokens for repeat in result.repeats])
        table.add_row(
            result.spec.name,
            Text(headline_text(result)),
            number_text(figures["wall_s"].median),
            number_text(figures["output_tok_s"].median),
            number_text(figures["total_tok_s"].median),
            f"{cached.median:g}",
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """A table with a row per peer: its figure on each workload, and its speed by the baseline's."""
    table = Table(
        title=Text(f"medians [min-max]; x: speed as a multiple of {comparison.baseline}'s"),
        title_justify="left",
    )
    table.add_column("peer")
    for workload in comparison.results:
        table.add_column(workload, justify="right")
    for peer, of_peer in comparison.ratios().items():
        cells = []
        for workload, results in comparison.results.items():
            figure = headline_text(results[peer]) if peer in results else "-"
            multiple = f"\n{spread_text(of_peer[workload])} x" if workload in of_peer else ""
            cells.append(Text(figure + multiple))
        table.add_row(peer, *cells)
    return table


def peer_table(facts: Mapping[str, PeerFacts]) -> Table:
    table = Table(title="peers", title_justify="left")
    table.add_column("peer")
    table.add_column("start s", justify="right")
    table.add_column("peak GiB", justify="right")
    for name, of_peer in facts.items():
        table.add_row(name, f"{of_peer.start_s:.1f}", f"{of_peer.peak_rss_bytes / 2**30:.2f}")
    return table


def headline_text(result: OfflineResult) -> str:
    values = result.headline_values
    headline: Headline = result.spec.headline
    if not values:
        return "-"
    return f"{spread_text(Spread.of(values))} {headline.unit}"


def spread_text(spread: Spread) -> str:
    middle = spread.median
    median, low, high = (
        number_text(value, like=middle) for value in (middle, spread.minimum, spread.maximum)
    )
    return median if spread.count == 1 else f"{median} [{low}-{high}]"


def number_text(value: float, *, like: float | None = None) -> str:
    """A number with three or four digits, or with as many decimals as `like` would have."""
    size = abs(value if like is None else like)
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"
