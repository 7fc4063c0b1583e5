"""Runs suites and measures. A test that fails is repeated; one that fails only sometimes is told as
such, and is no success."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from scripts.nightly.registry import Case, Suite, lacks
from scripts.nightly.results import Figure, SuiteResult, figures_of

MOST_REPEATED = 30
"""More failures than that have one cause, which repeats do not tell."""

NUM_SLOWEST = 10
_HOUR_S = 3600.0


def run_suite(suite: Suite, *, repeats: int, workers: int, root: Path) -> SuiteResult:
    """
    repeats  times that each failed test runs again, alone
    workers  processes side by side
    """
    missing = lacks(suite.needs)
    if missing:
        return SuiteResult(name=suite.name, lacks=missing)
    start = time.monotonic()
    outcomes, seconds, broken = _pytest([*suite.pytest, "-n", str(workers)], root)
    failed = sorted(test for test, outcome in outcomes.items() if outcome == "failed")
    flaky: dict[str, tuple[int, int]] = {}
    if repeats and len(failed) <= MOST_REPEATED:
        for test in failed:
            num_failed, num_run = repeat(test, repeats, root)
            if num_failed < num_run:
                flaky[test] = (num_failed + 1, num_run + 1)
    counts = Counter(outcomes.values())
    return SuiteResult(
        name=suite.name,
        seconds=round(time.monotonic() - start, 1),
        num_passed=counts["passed"],
        num_skipped=counts["skipped"],
        failed=[test for test in failed if test not in flaky],
        flaky=flaky,
        slowest=sorted(((s, test) for test, s in seconds.items()), reverse=True)[:NUM_SLOWEST],
        broken=broken,
    )


def repeat(test: str, times: int, root: Path) -> tuple[int, int]:
    """(times that the test failed, times that it ran), each in a process of its own."""
    num_failed = 0
    for _ in range(times):
        outcomes, _, broken = _pytest([test, "-m", "", "-p", "no:randomly"], root)
        num_failed += broken is not None or outcomes.get(test) != "passed"
    return num_failed, times


def _pytest(
    arguments: Sequence[str], root: Path
) -> tuple[dict[str, str], dict[str, float], str | None]:
    """(test -> passed, failed or skipped; test -> seconds; why pytest itself ended badly)"""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "junit_family=xunit1"]
        command += [f"--junitxml={report}", *arguments]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if not report.is_file():
            return {}, {}, (done.stdout + done.stderr)[-2000:]
        outcomes, seconds = _read_report(report)
    # 0: all passed, 1: some failed, 5: no test was selected.
    broken = None if done.returncode in (0, 1) else (done.stdout + done.stderr)[-2000:]
    return outcomes, seconds, broken


def _read_report(path: Path) -> tuple[dict[str, str], dict[str, float]]:
    outcomes, seconds = {}, {}
    for case in ElementTree.parse(path).iter("testcase"):
        test = _node_id(case)
        tags = {child.tag for child in case}
        outcomes[test] = (
            "failed"
            if tags & {"failure", "error"}
            else "skipped"
            if "skipped" in tags
            else "passed"
        )
        seconds[test] = float(case.get("time", 0.0))
    return outcomes, seconds


def _node_id(case: ElementTree.Element) -> str:
    """tests/a/test_b.py::TestC::test_d: how pytest takes it again."""
    file, name = case.get("file", ""), case.get("name", "")
    module = file.removesuffix(".py").replace("/", ".")
    within = (case.get("classname") or "").removeprefix(module).strip(".")
    return "::".join(part for part in (file, within.replace(".", "::"), name) if part)


def run_case(case: Case, root: Path) -> tuple[list[Figure], str | None]:
    """(figures, why there are none)"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sapwood", *case.arguments, "--output-dir", folder]
        try:
            done = subprocess.run(
                command, cwd=root, capture_output=True, text=True, timeout=_HOUR_S, check=False
            )
        except subprocess.TimeoutExpired:
            return [], f"it took more than {_HOUR_S:.0f} s"
        reports = sorted(Path(folder).glob("*.json"))
        if done.returncode != 0 or not reports:
            return [], (done.stdout + done.stderr)[-2000:]
        report = json.loads(reports[-1].read_text("utf-8"))
    return figures_of(report, case.measure, case.model, case.variant), None
