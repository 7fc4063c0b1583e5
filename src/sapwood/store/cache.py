"""The model cache on disk: one writer per key, and nothing half-written is ever found.

home/locks/KEY.lock    held with flock while somebody writes KEY; never removed
home/staging/KEY/…     files that are being written; without the lock they are stale
home/models, home/hub, home/prepared   complete files
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sapwood.store.progress import Progress, stage


def safe_key(text: str) -> str:
    """A file name made of letters, digits and "._-@" that still reads like `text`."""
    return re.sub(r"[^A-Za-z0-9._@-]+", "--", text).strip(".") or "-"


@contextmanager
def staging(home: Path, key: str, progress: Progress) -> Iterator[Path]:
    """A fresh directory on the cache's file system, for the one writer of `key`.

    Waits while another thread or process writes the same key, so the caller must check again
    whether the work is done already. The directory is removed afterwards, however the body ends;
    the files of a killed process are removed by the key's next writer.
    """
    with _locked(home / "locks" / f"{key}.lock", key, progress):
        parent = home / "staging" / key
        # We hold the lock, so these are the files of a writer that was killed.
        shutil.rmtree(parent, ignore_errors=True)
        parent.mkdir(parents=True)
        try:
            yield Path(tempfile.mkdtemp(dir=parent))
        finally:
            shutil.rmtree(parent, ignore_errors=True)


@contextmanager
def _locked(path: Path, key: str, progress: Progress) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with stage(progress, f"waiting for another process that writes {key}", None):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def publish(staged: Path, target: Path) -> None:
    """Move a finished file or directory to its place, atomically and durably.

    A reader sees the old state or the whole new one. A directory's target must not exist.
    """
    if staged.is_dir():
        for path in staged.rglob("*"):
            if path.is_file():
                _fsync(path)
    _fsync(staged)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
