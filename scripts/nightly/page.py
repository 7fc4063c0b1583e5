"""The page that plots all runs of a folder over time: one file of HTML, without a script."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from scripts.nightly.results import Figure, Results

WIDTH, HEIGHT, PAD = 420, 150, 34
COLOURS = ("#2a7f4f", "#b3541e", "#3b5bab", "#8a3b8f", "#7a6a1c")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>sapwood, night by night</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .15rem .7rem .15rem 0; text-align: left }}
figure {{ display: inline-block; margin: 0 1rem 1.2rem 0 }} figcaption {{ font-weight: 600 }}
.bad {{ color: #b00020 }} small {{ color: #666 }} pre {{ white-space: pre-wrap }}
</style>
</head>
<body>
<h1>sapwood, night by night</h1>
{body}
</body>
</html>
"""


def write_page(runs: Sequence[Results], path: Path) -> None:
    """runs: the oldest first; at least one"""
    last = runs[-1]
    facts = last.environment
    parts = [
        f"<p>{len(runs)} runs; the last of commit {_text(facts['commit'])}, "
        f"{_text(facts['date'])}, on {_text(facts['cpu'])}, {facts['num_cores']} cores.</p>",
        "<h2>Tests of the last run</h2>",
        _suites(last),
        "<h2>Flaky tests of all runs</h2>",
        _flaky(runs),
        "<h2>Speed and accuracy</h2>",
        _plots(runs),
    ]
    for name, why in last.broken.items():
        parts.append(f'<h3 class="bad">no figure: {_text(name)}</h3><pre>{_text(why)}</pre>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.format(body="\n".join(parts)), "utf-8")


def _text(value: object) -> str:
    return html.escape(str(value))


def _suites(run: Results) -> str:
    rows = ["<tr><th>suite</th><th>passed</th><th>failed</th><th>skipped</th><th>minutes</th></tr>"]
    for suite in run.suites:
        if suite.lacks:
            rows.append(
                f"<tr><td>{_text(suite.name)}</td><td colspan=4>did not run: the machine lacks "
                f"{_text(', '.join(suite.lacks))}</td></tr>"
            )
            continue
        bad = len(suite.failed) + len(suite.flaky)
        shown = f'<td class="bad">{bad}</td>' if bad or suite.broken else "<td>0</td>"
        rows.append(
            f"<tr><td>{_text(suite.name)}</td><td>{suite.num_passed}</td>{shown}"
            f"<td>{suite.num_skipped}</td><td>{suite.seconds / 60:.1f}</td></tr>"
        )
        failed = [*suite.failed, *([suite.broken] if suite.broken else [])]
        rows += [f'<tr><td></td><td colspan=4 class="bad">{_text(one)}</td></tr>' for one in failed]
    return f"<table>{''.join(rows)}</table>"


def _flaky(runs: Sequence[Results]) -> str:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for run in runs:
        for suite in run.suites:
            for test, (num_failed, num_run) in suite.flaky.items():
                counts[test][0] += num_failed
                counts[test][1] += num_run
    if not counts:
        return "<p>None.</p>"
    rows = "".join(
        f"<tr><td>{_text(test)}</td><td>failed {failed} of {total} times</td></tr>"
        for test, (failed, total) in sorted(counts.items())
    )
    return f"<table>{rows}</table>"


def _plots(runs: Sequence[Results]) -> str:
    """One plot for each figure of each model, with a line for each variant."""
    series: dict[tuple[str, str], dict[str, list[tuple[int, Figure]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for number, run in enumerate(runs):
        for figure in run.figures:
            series[figure.model, figure.name][figure.variant].append((number, figure))
    return "".join(
        _plot(f"{model}, {name}", lines, len(runs)) for (model, name), lines in series.items()
    )


def _plot(title: str, lines: dict[str, list[tuple[int, Figure]]], num_runs: int) -> str:
    some = next(iter(lines.values()))[0][1]
    top = max(figure.value for points in lines.values() for _, figure in points) * 1.1 or 1.0
    step = (WIDTH - 2 * PAD) / max(num_runs - 1, 1)

    def at(number: int, value: float) -> str:
        return f"{PAD + number * step:.1f},{HEIGHT - PAD + (2 * PAD - HEIGHT) * value / top:.1f}"

    drawn, names = [], []
    for colour, (variant, points) in zip(COLOURS * len(lines), sorted(lines.items()), strict=False):
        places = [at(number, figure.value) for number, figure in points]
        drawn.append(
            f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}"/>'
            + "".join(
                f'<circle cx="{place.split(",")[0]}" cy="{place.split(",")[1]}" r="2.5" '
                f'fill="{colour}"><title>{_text(variant)}: {figure.value:.4g}</title></circle>'
                for place, (_, figure) in zip(places, points, strict=True)
            )
        )
        last = points[-1][1].value
        names.append(f'<span style="color:{colour}">{_text(variant)} {last:.4g}</span>')
    axis = (
        f'<line x1="{PAD}" y1="{HEIGHT - PAD}" x2="{WIDTH - PAD}" y2="{HEIGHT - PAD}" '
        f'stroke="#999"/><text x="2" y="{PAD + 4}" font-size="11">{top:.3g}</text>'
        f'<text x="2" y="{HEIGHT - PAD}" font-size="11">0</text>'
    )
    better = "higher" if some.higher_is_better else "lower"
    return (
        f"<figure><figcaption>{_text(title)}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{axis}{"".join(drawn)}</svg><br>'
        f"{', '.join(names)} <small>{_text(some.unit)}; {better} is better</small></figure>"
    )
