"""The engine's process before it is told what to serve."""

from __future__ import annotations

from sapwood.app.engine_start import start_engine_process


def test_it_ends_without_a_word_when_its_parent_ends_first() -> None:
    process = start_engine_process()
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 1
