"""Copies of pages as files that NIXL moves."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.memory.storage.test_file import KEYS, PAGE, page, read

pytest.importorskip("nixl_cu12", exc_type=ImportError)

from sapwood.memory.storage.file import HEADER, FileStorage
from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.nixl import NixlMoves

MOVES = NixlMoves("POSIX")
EVERY = [bytes(page(index)) for index in range(len(KEYS))]


def stored(directory: Path) -> FileStorage:
    storage = FileStorage(directory, moves=MOVES)
    assert storage.batch_set(KEYS, [page(index) for index in range(len(KEYS))]) == len(KEYS)
    return storage


def test_the_files_are_those_that_the_system_reads_and_writes(tmp_path: Path) -> None:
    storage, plain = stored(tmp_path), FileStorage(tmp_path)
    assert plain.num_bytes == storage.num_bytes == len(KEYS) * (HEADER.size + PAGE)
    assert read(plain, KEYS) == read(storage, KEYS) == EVERY
    storage.clear()
    assert plain.batch_set(KEYS, [page(index) for index in range(len(KEYS))]) == len(KEYS)
    assert read(storage, KEYS) == EVERY
    assert NixlMoves().plugin in ("HF3FS", "POSIX")


@pytest.mark.parametrize("fault", ["torn", "flipped", "gone"])
def test_a_copy_that_is_not_whole_ends_the_batch_and_is_written_again(
    tmp_path: Path, fault: str
) -> None:
    storage = stored(tmp_path)
    path = tmp_path / f"{KEYS[2]}.bin"
    content = bytearray(path.read_bytes())
    if fault == "flipped":
        content[500] ^= 1
        path.write_bytes(content)
    elif fault == "torn":
        path.write_bytes(content[:500])
    else:
        path.unlink()
    assert read(storage, KEYS) == EVERY[:2]
    assert not path.exists()
    assert stored(tmp_path).batch_exists(KEYS) == len(KEYS)


def test_a_file_that_shrinks_meanwhile_is_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent that was at work on it is not used again."""
    storage = stored(tmp_path)
    status = os.fstat

    def shrinking(file: int) -> os.stat_result:
        told = status(file)
        if told.st_ino == shrunk.stat().st_ino:
            os.truncate(shrunk, 100)
        return told

    shrunk = tmp_path / f"{KEYS[1]}.bin"
    monkeypatch.setattr(os, "fstat", shrinking)
    with pytest.raises(StorageUnavailable, match="NIXL's plug-in POSIX cannot read"):
        read(storage, KEYS[1:3])
    monkeypatch.undo()
    assert read(storage, KEYS[2:]) == EVERY[2:]


def test_a_full_disk_is_said_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileStorage(tmp_path, moves=MOVES)
    opened = os.open

    def readable(path: str, flags: int, mode: int = 0o777) -> int:
        """A file that nobody can write to, as if the disk were full."""
        file = opened(path, flags, mode)
        if flags & os.O_WRONLY:
            os.close(file)
            file = opened(path, os.O_RDONLY)
        return file

    monkeypatch.setattr(os, "open", readable)
    with pytest.raises(StorageUnavailable, match="cannot write"):
        storage.batch_set(KEYS, [page(0) for _ in KEYS])
    assert list(tmp_path.iterdir()) == []


def test_threads_read_and_write_side_by_side(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, moves=MOVES)

    def work(thread: int) -> list[bytes]:
        keys = [f"{thread:032x}{key[32:]}" for key in KEYS]
        for _ in range(5):
            storage.batch_set(keys, [page(thread) for _ in keys])
            found = read(storage, keys)
        return found

    with ThreadPoolExecutor(4) as threads:
        for thread, found in enumerate(threads.map(work, range(4))):
            assert found == [bytes(page(thread))] * len(KEYS)
