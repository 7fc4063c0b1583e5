"""What runs at night: picked by what the machine has, repeated where it failed, plotted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.nightly.__main__ import main
from scripts.nightly.registry import RegistryError, Suites, cpu_flags, lacks
from scripts.nightly.results import Results, figures_of, read_all

ROOT = Path(__file__).parents[2]

TESTS = """
from pathlib import Path

import pytest

COUNT = Path(__file__).with_name("count")


def test_good():
    pass


@pytest.mark.parametrize("value", [1])
def test_bad(value):
    assert value == 2


class TestSome:
    def test_sometimes(self):
        COUNT.write_text(COUNT.read_text() + "x" if COUNT.exists() else "x")
        assert len(COUNT.read_text()) % 2 == 0


def test_skipped():
    pytest.skip("for want of it")
"""
SUITES = """
[[suite]]
name = "small"
about = "four tests"
pytest = ["test_small.py"]
when = ["nightly"]
minutes = 1

[[suite]]
name = "never"
about = "what no machine has"
pytest = ["test_small.py"]
when = ["nightly"]
needs = ["command:no-such-command"]
minutes = 1
"""


def test_every_suite_names_tests_that_there_are() -> None:
    registered = Suites.read(ROOT / "tests" / "suites.toml")
    assert {one.name for one in registered.suites} >= {"change", "long", "gpu"}
    for suite in registered.suites:
        for argument in suite.pytest:
            assert not argument.startswith("tests/") or (ROOT / argument).exists(), argument
        lacks(suite.needs)
    cases = registered.cases(registered.measures[0])
    assert len(cases) == len(registered.measures[0].models) * len(registered.variants)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("minutes = 1", 'minutes = 1\nmood = "good"', 1), "mood"),
        (('name = "never"', 'name = "small"', 1), "small twice"),
        (('"nightly"', '"hourly"', 1), "hourly"),
        (('about = "four tests"', "", 1), "about"),
    ],
)
def test_a_wrong_entry_is_told(tmp_path: Path, change: tuple[Any, ...], says: str) -> None:
    path = tmp_path / "suites.toml"
    path.write_text(SUITES.replace(*change))
    with pytest.raises(RegistryError, match=says):
        Suites.read(path)


def test_what_a_machine_lacks(tmp_path: Path) -> None:
    assert lacks(["package:pytest", "memory:0.001"]) == []
    assert lacks(["memory:1e9", "package:no_such_package"]) == [
        "memory:1e9",
        "package:no_such_package",
    ]
    with pytest.raises(RegistryError, match="colour"):
        lacks(["colour:green"])
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu amx_int8\n")
    assert cpu_flags(tmp_path / "cpuinfo") == {"fpu", "amx_int8"}
    assert cpu_flags(tmp_path / "none") == frozenset()


def test_a_night_tells_what_failed_always_and_what_sometimes(tmp_path: Path, capsys) -> None:
    (tmp_path / "test_small.py").write_text(TESTS)
    (tmp_path / "suites.toml").write_text(SUITES)
    common = ["--suites", str(tmp_path / "suites.toml"), "--root", str(tmp_path)]
    nights = str(tmp_path / "nights")
    assert main([*common, "run", "--results", nights, "--workers", "1", "--repeats", "2"]) == 1
    [run] = read_all(Path(nights))
    small, never = run.suites
    assert (small.num_passed, small.num_skipped) == (1, 1)
    assert small.failed == ["test_small.py::test_bad[1]"]
    assert list(small.flaky) == ["test_small.py::TestSome::test_sometimes"]
    assert never.lacks == ["command:no-such-command"]
    page = tmp_path / "page" / "index.html"
    assert main([*common, "page", "--results", nights, "--output", str(page)]) == 0
    shown = page.read_text()
    assert "test_bad[1]" in shown
    assert "failed 2 of 3 times" in shown
    assert "the machine lacks command:no-such-command" in shown
    assert main([*common, "flaky", "test_small.py::test_good", "--times", "1"]) == 0
    assert "failed 0 of 1 times" in capsys.readouterr().out


def test_figures_are_plotted_over_the_runs(tmp_path: Path, capsys) -> None:
    report = {
        "kind": "offline",
        "workloads": [
            {
                "workload": {"name": "a"},
                "headline": {
                    "metric": "decode_tok_s",
                    "label": "decode",
                    "unit": "tok/s",
                    "higher_is_better": True,
                },
                "figures": {"decode_tok_s": {"median": 73.5}},
            }
        ],
    }
    for day, factor in ((1, 1.0), (2, 2.0)):
        facts = {"commit": f"abc{day}", "date": f"2026-01-0{day}T00:00:00+00:00"}
        report["workloads"][0]["figures"]["decode_tok_s"]["median"] = 73.5 * factor  # type: ignore[index]
        figures = figures_of(report, "speed", "<tiny>", "bf16")
        figures += figures_of(
            {"kind": "perplexity", "perplexity": 9.5}, "accuracy", "<tiny>", "bf16"
        )
        Results(environment={**facts, "cpu": "a CPU", "num_cores": 2}, figures=figures).write(
            tmp_path
        )
    assert main(["page", "--results", str(tmp_path), "--output", str(tmp_path / "p.html")]) == 0
    shown = (tmp_path / "p.html").read_text()
    assert "&lt;tiny&gt;, a: decode" in shown
    assert "<title>bf16: 73.5</title>" in shown
    assert "bf16 147" in shown
    assert "lower is better" in shown
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["schema"] == 1
    with pytest.raises(SystemExit):
        main(["run", "--when", "hourly"])
    assert main(["page", "--results", str(tmp_path / "none")]) == 2
    assert "make nightly" in capsys.readouterr().err
