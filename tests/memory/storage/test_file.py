"""Copies of pages as files: what is not whole is a miss, and foreign files stay as they are."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapwood.base.errors import ConfigError
from sapwood.memory.storage.file import HEADER, FileStorage
from sapwood.memory.storage.interface import PageStorage, StorageUnavailable
from sapwood.memory.storage.sealed import SealedStorage

KEYS = [f"{index:064x}_model-0123456789abcdef_0_1" for index in range(6)]
PAGE = 1000
SECRET = "ab" * 32


def page(index: int) -> memoryview:
    return memoryview(bytes([index]) * PAGE)


def read(storage: PageStorage, keys: list[str]) -> list[bytes]:
    views = [memoryview(bytearray(PAGE)) for _ in keys]
    count = storage.batch_get(keys, views)
    return [bytes(view) for view in views[:count]]


def stored(directory: Path, **options: int) -> FileStorage:
    storage = FileStorage(directory, **options)
    assert storage.batch_set(KEYS, [page(index) for index in range(len(KEYS))]) == len(KEYS)
    return storage


def test_what_was_stored_is_read_by_another_server(tmp_path: Path) -> None:
    stored(tmp_path)
    other = FileStorage(tmp_path)
    assert other.batch_exists(KEYS) == len(KEYS)
    assert read(other, KEYS) == [bytes(page(index)) for index in range(len(KEYS))]
    assert other.batch_exists([*KEYS[:2], "f" * 64 + "_x_0_1", KEYS[2]]) == 2


@pytest.mark.parametrize("fault", ["torn", "longer", "flipped", "mark", "empty", "folder", "link"])
def test_a_copy_that_is_not_whole_ends_the_batch_and_is_written_again(
    tmp_path: Path, fault: str
) -> None:
    storage = stored(tmp_path)
    path = tmp_path / f"{KEYS[2]}.bin"
    content = bytearray(path.read_bytes())
    assert len(content) == HEADER.size + PAGE
    match fault:
        case "torn":
            del content[500:]
        case "longer":
            content += b"\0"
        case "flipped":
            content[700] ^= 1
        case "mark":
            content[0] ^= 1
        case "empty":
            content.clear()
    path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault == "link":
        path.symlink_to(tmp_path / f"{KEYS[1]}.bin")
    else:
        path.write_bytes(content)
    assert read(storage, KEYS) == [bytes(page(0)), bytes(page(1))]
    if fault not in ("folder", "link"):  # which are left alone
        storage.batch_set(KEYS, [page(index) for index in range(len(KEYS))])
        assert len(read(storage, KEYS)) == len(KEYS)


def test_the_copies_used_longest_ago_go_when_the_directory_is_too_large(tmp_path: Path) -> None:
    storage = stored(tmp_path, max_bytes=4 * (PAGE + HEADER.size))
    assert storage.num_bytes <= 4 * (PAGE + HEADER.size)
    left = [index for index, key in enumerate(KEYS) if (tmp_path / f"{key}.bin").exists()]
    assert 0 < len(left) <= 4
    first, *others = left
    for index in others:  # older than the first one
        os.utime(tmp_path / f"{KEYS[index]}.bin", (1, 1))
    assert read(storage, [KEYS[first]]) == [bytes(page(first))]
    gone = [key for index, key in enumerate(KEYS) if index not in left]
    storage.batch_set(gone, [page(0) for _ in gone])
    assert (tmp_path / f"{KEYS[first]}.bin").exists(), "it was read last"


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    foreign = [tmp_path / "notes.txt", tmp_path / "model.bin", tmp_path / f"{'a' * 63}_x_0_1.bin"]
    for path in foreign:
        path.write_bytes(b"x" * 5000)
    left_behind = tmp_path / f".{KEYS[0]}.12-1.writing"
    left_behind.write_bytes(b"half")
    os.utime(left_behind, (1, 1))
    storage = stored(tmp_path, max_bytes=2 * (PAGE + HEADER.size))
    assert not left_behind.exists()
    storage.clear()
    assert sorted(tmp_path.iterdir()) == sorted(foreign)


def test_a_full_disk_is_said_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileStorage(tmp_path)
    write = os.pwritev

    def half(file: int, views: list[memoryview], offset: int) -> int:
        write(file, [views[0][:10]], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", half)
    with pytest.raises(StorageUnavailable, match="No space left on device"):
        storage.batch_set(KEYS, [page(0) for _ in KEYS])
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_vanishes_is_a_miss(tmp_path: Path) -> None:
    storage = stored(tmp_path / "kv")
    storage.clear()
    (tmp_path / "kv").rmdir()
    assert storage.batch_exists(KEYS) == 0
    assert read(storage, KEYS) == []
    with pytest.raises(StorageUnavailable):
        storage.batch_set(KEYS, [page(0) for _ in KEYS])


def test_sealed_copies_need_the_key_and_their_name(tmp_path: Path) -> None:
    sealed = SealedStorage(FileStorage(tmp_path), SECRET)
    sealed.batch_set(KEYS[:3], [page(index) for index in range(3)])
    assert read(sealed, KEYS[:3]) == [bytes(page(index)) for index in range(3)]
    assert bytes(page(1))[:50] not in (tmp_path / f"{KEYS[1]}.bin").read_bytes()
    other = SealedStorage(FileStorage(tmp_path), "cd" * 32)
    assert read(other, KEYS[:3]) == []
    (tmp_path / f"{KEYS[0]}.bin").replace(tmp_path / f"{KEYS[1]}.bin")
    assert read(sealed, KEYS[1:2]) == [], "a copy cannot stand for another one"
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        SealedStorage(FileStorage(tmp_path), "secret")


WRITER = """
import sys
from pathlib import Path
from sapwood.memory.storage.file import FileStorage
storage = FileStorage(Path(sys.argv[1]), max_bytes=3_000_000)
turn = 0
while True:
    keys = [f"{turn * 7 + at:064x}_model-0_0_1" for at in range(20)]
    storage.batch_set(keys, [memoryview(key[50:64].encode() * 5000) for key in keys])
    print(turn, flush=True)
    turn = (turn + 1) % 12
"""


def test_two_servers_on_one_directory_of_which_one_is_killed(tmp_path: Path) -> None:
    """While both write, evict and read, nothing wrong is ever read."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        storage = FileStorage(tmp_path, max_bytes=3_000_000)
        num_read, until_s = 0, time.monotonic() + 1.0
        while time.monotonic() < until_s or not num_read:
            if writers[0].poll() is None and time.monotonic() > until_s - 0.5:
                writers[0].kill()
            for at in range(100):
                key = f"{at:064x}_model-0_0_1"
                view = memoryview(bytearray(70_000))
                if storage.batch_get([key], [view]):
                    assert view == key[50:64].encode() * 5000
                    num_read += 1
        assert num_read > 100
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
