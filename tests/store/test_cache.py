from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sapwood.store import cache
from sapwood.store.progress import Silent


class Labels(Silent):
    """Remembers the stages, and says when somebody started to wait."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.waiting = threading.Event()

    def start(self, label: str, total: int | None) -> None:
        self.seen.append(label)
        if label.startswith("waiting"):
            self.waiting.set()


@pytest.mark.parametrize(
    ("text", "key"),
    [("org/name@main", "org--name@main"), ("a b/../c", "a--b--..--c"), ("...", "-"), ("", "-")],
)
def test_keys_are_single_path_components(text, key):
    assert cache.safe_key(text) == key


def write_half(home: Path) -> None:
    with cache.staging(home, "k", Silent()) as directory:
        (directory / "half").touch()
        raise KeyboardInterrupt


def test_staging_is_gone_afterwards_even_after_an_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path)
    assert not list((tmp_path / "staging").iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path):
    stale = tmp_path / "staging" / "k" / "tmpold"
    stale.mkdir(parents=True)
    (stale / "half").touch()
    with cache.staging(tmp_path, "k", Silent()) as directory:
        assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    assert not stale.exists()


def test_one_writer_per_key_and_the_other_says_that_it_waits(tmp_path):
    order: list[str] = []
    progress = Labels()

    def second() -> None:
        with cache.staging(tmp_path, "k", progress):
            order.append("second")

    with cache.staging(tmp_path, "k", Silent()), cache.staging(tmp_path, "other", Silent()):
        thread = threading.Thread(target=second)
        thread.start()
        assert progress.waiting.wait(timeout=10)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]
    assert progress.seen == ["waiting for another process that writes k"]


def test_publish_moves_files_and_directories(tmp_path: Path):
    staged = tmp_path / "staged"
    (staged / "sub").mkdir(parents=True)
    (staged / "sub" / "file").write_text("x")
    cache.publish(staged, tmp_path / "to" / "here")
    assert (tmp_path / "to" / "here" / "sub" / "file").read_text() == "x"
    assert not staged.exists()
    new = tmp_path / "new"
    new.write_text("new")
    target = tmp_path / "file"
    target.write_text("old")
    cache.publish(new, target)
    assert target.read_text() == "new"
