"""The progress of a pull, for a bar on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Protocol

POLL_S = 0.2
"""Seconds between two looks at the size of a growing download."""


class Progress(Protocol):
    """One stage at a time: `start`, any number of `advance`, `finish`.

    `advance` may come from another thread than `start`.
    """

    def start(self, label: str, total: int | None) -> None:
        """A stage begins; `total` is in bytes, None where nobody knows it."""
        ...

    def advance(self, amount: int) -> None:
        """Count further bytes of this stage as done."""
        ...

    def finish(self) -> None:
        """The stage has ended, well or not."""
        ...


class Silent:
    """A Progress that shows nothing."""

    def start(self, label: str, total: int | None) -> None:
        del label, total

    def advance(self, amount: int) -> None:
        del amount

    def finish(self) -> None:
        return None


@contextmanager
def stage(progress: Progress, label: str, total: int | None) -> Iterator[None]:
    """A stage for the duration of the `with` block, finished however the block ends."""
    progress.start(label, total)
    try:
        yield
    finally:
        progress.finish()


def bytes_under(directory: Path) -> int:
    """Bytes of all files below a directory that others may change meanwhile."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
        except FileNotFoundError:
            continue  # renamed or removed between the listing and the look
    return total


class Growth:
    """Reports how much a directory grows from now on, `limit` bytes at most.

    The reported size never shrinks and never exceeds the limit, although a tool may move its
    finished file about, so that the file is there twice, or not at all, when we look.
    """

    def __init__(self, directory: Path, progress: Progress, limit: int | None) -> None:
        self._directory = directory
        self._progress = progress
        self._limit = limit
        self._start = bytes_under(directory)
        self._reported = 0

    def poll(self) -> None:
        """Look once, and report the growth since the last look."""
        grown = bytes_under(self._directory) - self._start
        if self._limit is not None:
            grown = min(grown, self._limit)
        if grown > self._reported:
            self._progress.advance(grown - self._reported)
            self._reported = grown


@contextmanager
def watching(directory: Path, progress: Progress, limit: int | None) -> Iterator[None]:
    """Report the growth of a directory from a thread of its own while the body runs."""
    growth = Growth(directory, progress, limit)
    done = Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            growth.poll()

    thread = Thread(target=watch, name="sapwood-download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        growth.poll()
