"""python -m scripts.nightly list|run|page|flaky"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sapwood.bench.environment import describe_environment
from scripts.nightly.page import write_page
from scripts.nightly.registry import WHEN, RegistryError, Suites, lacks
from scripts.nightly.results import Results, read_all
from scripts.nightly.run import repeat, run_case, run_suite

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    try:
        return int(asked.do(asked))
    except RegistryError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nightly", description="Run what tests/suites.toml registers, and show what came out."
    )
    parser.add_argument("--suites", type=Path, default=ROOT / "tests" / "suites.toml")
    parser.add_argument("--root", type=Path, default=ROOT, help="where pytest runs")
    commands = parser.add_subparsers(required=True)
    lists = commands.add_parser("list", help="what there is, and what this machine lacks for it")
    lists.set_defaults(do=_list)
    runs = commands.add_parser("run", help="run it, and write a file of results")
    runs.set_defaults(do=_run)
    runs.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these alone")
    runs.add_argument("--repeats", type=int, default=3, help="times that a failed test runs again")
    runs.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    for command in (lists, runs):
        command.add_argument("--when", choices=WHEN, default="nightly", help="the occasion")
    page = commands.add_parser("page", help="plot all files of results")
    page.set_defaults(do=_page)
    page.add_argument("--output", type=Path, default=ROOT / "build" / "nightly" / "index.html")
    for command in (runs, page):
        command.add_argument("--results", type=Path, default=ROOT / "build" / "nightly")
    flaky = commands.add_parser("flaky", help="run tests many times, each time alone")
    flaky.set_defaults(do=_flaky)
    flaky.add_argument("tests", nargs="+", metavar="TEST", help="as pytest names it")
    flaky.add_argument("--times", type=int, default=20)
    return parser


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _list(asked: argparse.Namespace) -> int:
    registered = Suites.read(asked.suites)
    for one in (*registered.suites, *registered.measures):
        if asked.when not in one.when:
            continue
        missing = lacks(one.needs)
        state = f"lacks {', '.join(missing)}" if missing else f"{one.minutes} min"
        _say(f"{one.name:12} {state:34} {one.about}")
    return 0


def _run(asked: argparse.Namespace) -> int:
    registered = Suites.read(asked.suites)
    names = {one.name for one in (*registered.suites, *registered.measures)}
    if unknown := sorted(set(asked.only) - names):
        raise RegistryError(f"there is no {unknown[0]}; known: {', '.join(sorted(names))}")

    def is_asked(name: str, when: Sequence[str]) -> bool:
        return name in asked.only if asked.only else asked.when in when

    results = Results(environment=asdict(describe_environment()))
    for suite in registered.suites:
        if is_asked(suite.name, suite.when):
            _say(f"{suite.name}: about {suite.minutes} min")
            found = run_suite(suite, repeats=asked.repeats, workers=asked.workers, root=asked.root)
            results.suites.append(found)
            for test in (*found.failed, *found.flaky):
                _say(f"  {'flaky' if test in found.flaky else 'failed'}: {test}")
    for measure in registered.measures:
        if not is_asked(measure.name, measure.when) or lacks(measure.needs):
            continue
        for case in registered.cases(measure):
            _say(f"{measure.name}: {case.model}, {case.variant}")
            figures, broken = run_case(case, asked.root)
            results.figures.extend(figures)
            if broken is not None:
                results.broken[f"{measure.name}, {case.model}, {case.variant}"] = broken
                _say("  failed")
    _say(f"wrote {results.write(asked.results)}")
    return 0 if results.is_good else 1


def _page(asked: argparse.Namespace) -> int:
    runs = read_all(asked.results)
    if not runs:
        raise RegistryError(f"{asked.results} has no results; `make nightly` writes some")
    write_page(runs, asked.output)
    _say(f"wrote {asked.output}")
    return 0


def _flaky(asked: argparse.Namespace) -> int:
    num_bad = 0
    for test in asked.tests:
        num_failed, num_run = repeat(test, asked.times, asked.root)
        _say(f"{test}: failed {num_failed} of {num_run} times")
        num_bad += num_failed > 0
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
