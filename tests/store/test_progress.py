from __future__ import annotations

import io

import pytest
from rich.console import Console

from sapwood.store.progress import Growth, Silent, stage, watching
from sapwood.store.terminal import TerminalProgress, in_minutes


class Counting(Silent):
    def __init__(self) -> None:
        self.amount = 0
        self.finished = 0

    def advance(self, amount: int) -> None:
        assert amount > 0
        self.amount += amount

    def finish(self) -> None:
        self.finished += 1


def test_growth_never_shrinks_and_keeps_to_its_limit(tmp_path):
    (tmp_path / "before").write_bytes(b"x" * 1000)
    progress = Counting()
    growth = Growth(tmp_path, progress, 150)
    (tmp_path / "new").write_bytes(b"x" * 100)
    growth.poll()
    assert progress.amount == 100
    (tmp_path / "new").unlink()
    growth.poll()
    assert progress.amount == 100
    (tmp_path / "again").write_bytes(b"x" * 400)
    growth.poll()
    assert progress.amount == 150


def test_watching_reports_what_was_written_before_it_ends(tmp_path):
    progress = Counting()
    with watching(tmp_path, progress, None):
        (tmp_path / "new").write_bytes(b"x" * 321)
    assert progress.amount == 321


def test_a_stage_is_finished_after_an_error():
    progress = Counting()
    with pytest.raises(OSError, match="disk"), stage(progress, "label", 10):
        raise OSError("disk")
    assert progress.finished == 1


def test_the_terminal_shows_label_and_amount():
    out = io.StringIO()
    progress = TerminalProgress(Console(file=out, force_terminal=True, width=100))
    progress.start("downloading a model", 2_000_000)
    progress.advance(1_000_000)
    progress.finish()
    assert "downloading a model" in out.getvalue()
    assert "1.0/2.0 MB" in out.getvalue()


def test_a_log_file_gets_plain_lines_with_the_time_that_a_stage_took():
    out = io.StringIO()
    times = iter([10.0, 13.25, 20.0, 20.5])
    progress = TerminalProgress(Console(file=out, width=100), clock_s=lambda: next(times))
    progress.start("downloading [a] model", None)
    progress.advance(5)
    progress.start("preparing it", None)
    progress.finish()
    progress.finish()
    lines = ["downloading [a] model", "downloading [a] model: 3.2 s"]
    assert out.getvalue().splitlines() == [*lines, "preparing it", "preparing it: 0.5 s"]


def test_a_log_file_gets_a_line_per_step_with_the_time_that_is_left():
    out = io.StringIO()
    times = iter([0.0, 30.0, 300.0, 15000.0])
    console = Console(file=out, width=100)
    progress = TerminalProgress(console, lines=True, clock_s=lambda: next(times))
    progress.start("converting", 1000)
    progress.advance(250)
    progress.advance(5)
    progress.advance(745)
    progress.finish()
    assert out.getvalue().splitlines() == [
        "converting",
        "converting: 25% after 30 s, about 90 s left",
        "converting: 26% after 5 min, about 15 min left",
        "converting: 15000.0 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99.0, "99 s"), (100.0, "2 min"), (5970.0, "1 h 40 min"), (7260.0, "2 h 1 min")],
)
def test_times_in_words(seconds: float, words: str):
    assert in_minutes(seconds) == words
