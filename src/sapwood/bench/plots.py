"""Plots of benchmark results, as PNG. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sapwood.bench.distribution import Spread
from sapwood.bench.timeline import RequestTimeline

DPI = 110
BINS = 40
MAX_RATE_BINS = 120


def _figure(columns: int, *, height: float = 4.0, width: float = 5.0) -> tuple[Any, list[Any]]:
    """A figure of its own: pyplot would keep global state and look for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def plot_serving(timelines: Sequence[RequestTimeline], title: str, path: Path) -> None:
    """TTFT and ITL distributions, and output throughput over time."""
    figure, (ttft, itl, rate) = _figure(3)
    done = [timeline for timeline in timelines if timeline.error is None]
    _histogram(
        ttft, [t.ttft_s * 1e3 for t in done if t.ttft_s is not None], "TTFT (ms)", "requests"
    )
    _histogram(itl, [i * 1e3 for t in done for i in t.itl_s], "ITL (ms)", "token events")
    starts_s, rates, width_s = output_rates(done)
    rate.bar(starts_s, rates, width=width_s, align="edge")
    rate.set_xlabel("time (s)")
    rate.set_ylabel("output tok/s")
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def output_rates(
    timelines: Sequence[RequestTimeline],
) -> tuple[list[float], list[float], float]:
    """(starts of equal spans of time in s, output tok/s in each span, width of the spans in s)

    An event counts for as many tokens as its request's events hold on average.
    """
    end_s = max((t.end_s for t in timelines), default=0.0)
    if end_s <= 0:
        return [], [], 1.0
    width_s = max(1.0, end_s / MAX_RATE_BINS) if end_s > 10 else end_s / 10
    tokens = [0.0] * math.ceil(end_s / width_s)
    for timeline in timelines:
        for time_s in timeline.token_s:
            span = min(int(time_s / width_s), len(tokens) - 1)
            tokens[span] += timeline.num_output_tokens / len(timeline.token_s)
    starts_s = [index * width_s for index in range(len(tokens))]
    return starts_s, [count / width_s for count in tokens], width_s


def plot_repeats(
    figures: Mapping[str, tuple[str, Sequence[float]]], title: str, path: Path
) -> None:
    """One panel per workload: a bar at the median of the repeats, a dot for each repeat.

    figures  workload -> (axis label, a value for each repeat)
    """
    figure, axes = _figure(len(figures), width=3.0)
    for axis, (name, (label, values)) in zip(axes, figures.items(), strict=True):
        axis.bar([0], [Spread.of(values).median], width=0.6, color="tab:green", alpha=0.6)
        axis.plot([0] * len(values), list(values), "o", color="black", markersize=4)
        axis.set_xticks([0], [name])
        axis.set_ylabel(label)
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def plot_ratios(
    ratios: Mapping[str, Mapping[str, Spread]], baseline: str, title: str, path: Path
) -> None:
    """Bars of every peer's speed on every workload, as a multiple of the baseline's.

    ratios  peer -> workload -> ratio; above 1 is faster than the baseline
    """
    workloads = list(dict.fromkeys(name for of_peer in ratios.values() for name in of_peer))
    num_bars = len(workloads) * len(ratios)
    figure, (axis,) = _figure(1, width=2.0 + max(1.5 * max(len(workloads), 2), 0.4 * num_bars))
    width = 0.8 / max(len(ratios), 1)
    for position, (peer, of_peer) in enumerate(ratios.items()):
        shown = [name for name in workloads if name in of_peer]
        places = [workloads.index(name) + (position + 0.5) * width - 0.4 for name in shown]
        medians = [of_peer[name].median for name in shown]
        below = [of_peer[name].median - of_peer[name].minimum for name in shown]
        above = [of_peer[name].maximum - of_peer[name].median for name in shown]
        bars = axis.bar(places, medians, width=width, yerr=[below, above], capsize=3, label=peer)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(workloads)), workloads)
    axis.set_ylabel(f"speed relative to {baseline}")
    # Below the axes: bars leave no place among them.
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def _histogram(axis: Any, values: Sequence[float], label: str, counted: str) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel(counted)
    if values:
        axis.hist(values, bins=BINS)
    else:
        axis.text(0.5, 0.5, "no values", ha="center", transform=axis.transAxes)


def plot_shares(shares: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """A group of bars per row: the share of a limit that each implementation reaches."""
    figure, [axes] = _figure(1, width=9.0, height=1.5 + 0.28 * len(shares))
    names = list(dict.fromkeys(name for row in shares.values() for name in row))
    height = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        places = [row + index * height for row, of in enumerate(shares.values()) if name in of]
        values = [of[name] for of in shares.values() if name in of]
        axes.barh(places, values, height=height, label=name)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(shares))], list(shares))
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the limit")
    axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)
