"""Two ways that ranks exchange numbers are timed in turn, and give the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sapwood.base.errors import ConfigError
from sapwood.bench.cli import bench
from sapwood.bench.ranks.expert_rows import measure_expert_rows
from sapwood.bench.ranks.options import RanksOptions
from sapwood.bench.ranks.paired import time_in_turn
from sapwood.bench.ranks.sums import measure_sums
from sapwood.distributed.groups import Group
from tests.models.lm.rank_threads import on_ranks

SMALL: dict[str, Any] = {"rows": "1,3", "width": 32, "turns": 2, "calls": 2}


def test_ranks_are_measured_from_the_command_line(tmp_path: Path) -> None:
    given = [f"--{name}={value}" for name, value in SMALL.items()]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(
        bench, ["ranks", *given, "--output-dir", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "rows for 8 of 64 experts" in result.output
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["options"]["num_ranks"] == 2
    for pairs in (report["sums"], report["expert_rows"]):
        assert [pair["num_rows"] for pair in pairs] == [1, 3]
        assert all(len(pair[way]) == 2 for pair in pairs for way in ("own_s", "other_s"))
        assert all(value > 0 for pair in pairs for value in pair["own_s"] + pair["other_s"])
    assert path.with_suffix(".png").exists()


def test_a_rank_that_fails_ends_the_command(tmp_path: Path) -> None:
    # Ranks meet no longer than that, and the ranks take longer to start.
    command = ["ranks", "--timeout=0.01", "--output-dir", str(tmp_path)]
    result = CliRunner().invoke(bench, command)
    assert result.exit_code != 0
    assert "raise --timeout" in f"{result.output}{result.exception}"


def test_ways_take_turns_and_the_first_turn_is_not_counted() -> None:
    done: list[str] = []
    pair = time_in_turn(
        5,
        lambda: done.append("own"),
        lambda: done.append("other"),
        meet=lambda: done.append("meet"),
        turns=2,
        calls=1,
    )
    warm_up, first, second = done[:4], done[4:8], done[8:]
    assert warm_up == second == ["meet", "own", "meet", "other"]
    assert first == ["meet", "other", "meet", "own"]
    assert (pair.num_rows, len(pair.own_s), len(pair.other_s)) == (5, 2, 2)
    assert len(pair.ratios) == 2


class Wrong(Group):
    """A group that forgets what the first rank brings."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return super().all_reduce(torch.zeros_like(x) if self.rank == 0 else x)


def test_ways_that_differ_are_an_error() -> None:
    options = RanksOptions(**SMALL)

    def run(group: Group) -> list[str]:
        wrong = Wrong(rank=group.rank, size=group.size, process_group=group.process_group)
        with pytest.raises(RuntimeError) as of_sums:
            measure_sums(options, wrong, group)
        with pytest.raises(RuntimeError) as of_rows:
            measure_expert_rows(options, wrong, group)
        return [str(of_sums.value), str(of_rows.value)]

    for sums, rows in on_ranks(2, run):
        assert "not those of gloo" in sums
        assert "come back as others" in rows


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_ranks": 1}, "from 2 to 64"),
        ({"rows": "0"}, "must look like"),
        ({"num_ranks": 3}, "cannot be spread evenly"),
        ({"num_chosen": 65}, "cannot be spread evenly"),
        ({"calls": 0}, ">= 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RanksOptions(**options)
