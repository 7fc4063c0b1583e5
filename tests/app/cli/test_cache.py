"""`sapwood cache` shows and clears what servers have left in a storage directory."""

import os
import time
from pathlib import Path

import pytest

from sapwood.app.cli.main import main
from sapwood.memory.storage.file import FileStorage
from sapwood.memory.storage.names import CopyNames, part_name
from sapwood.schema.cache import FULL_POOL, CacheKind, CachePool

PAGE = memoryview(bytes(1000 - 32))  # a file has a header of 32 bytes
STATE = CachePool(CacheKind.STATE, (1,))
WINDOW = CachePool(CacheKind.WINDOW, (2,), window=4096)


def keep(directory: Path, model: str, identity: str, age_s: float, num: int) -> None:
    names = CopyNames(model, identity * 16, [FULL_POOL, STATE, WINDOW])
    storage = FileStorage(directory)
    for index in range(num):
        key = part_name(names.of(index % 3, bytes([index]) * 32), 0, 1)
        assert storage.batch_set([key], [PAGE]) == 1
        used_s = time.time() - age_s * (index + 1)
        os.utime(directory / f"{key}.bin", (used_s, used_s))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    keep(tmp_path, "org/old_model", "a", 86_400, 3)
    keep(tmp_path, "smollm2-135m", "b", 60, 2)
    keep(tmp_path, "smollm2-135m", "c", 3_600, 1)
    return tmp_path


def test_it_shows_copies_bytes_and_ages_by_model_the_last_used_first(directory, capsys) -> None:
    assert main(["cache", str(directory)]) == 0
    title, *rows, empty, whole = capsys.readouterr().out.splitlines()
    assert title.split() == ["MODEL", "WEIGHTS", "COPIES", "SIZE", "USED", "OLDEST"]
    assert [" ".join(row.split()) for row in rows] == [
        "smollm2-135m bbbbbbbb 2 2.0 kB 1 minute ago 2 minutes ago",
        "smollm2-135m cccccccc 1 1.0 kB 1 hour ago 1 hour ago",
        "org-old-model aaaaaaaa 3 3.0 kB 1 day ago 3 days ago",
    ]
    assert (empty, whole) == ("", f"6 copies, 6.0 kB, in {directory}")
    assert len(list(directory.iterdir())) == 6, "nothing is changed"


def test_clear_removes_the_copies_and_nothing_else(directory, capsys) -> None:
    others = [
        directory / "notes.txt",
        directory / f"{'f' * 64}_Qwen-Qwen3-8B_0_1.bin",  # of SGLang
        directory / f"{'f' * 64}_model-{'a' * 16}_0_1.bin",  # a folder of that name
    ]
    for other in others[:2]:
        other.write_bytes(b"mine")
    others[2].mkdir()
    assert main(["cache", str(directory), "--clear"]) == 0
    assert capsys.readouterr().out == f"removed 6 copies, 6.0 kB, from {directory}\n"
    assert sorted(directory.iterdir()) == sorted(others)
    assert main(["cache", str(directory)]) == 0
    assert capsys.readouterr().err == f"no pages in {directory}\n"


def test_without_an_argument_it_is_the_servers_directory(directory, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(directory))
    assert main(["cache"]) == 0
    assert f"6 copies, 6.0 kB, in {directory}" in capsys.readouterr().out


def test_what_is_no_directory_is_refused_and_not_made(tmp_path, capsys) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("gone", "file"):
        for clear in ([], ["--clear"]):
            assert main(["cache", str(tmp_path / name), *clear]) == 1
            assert f"{tmp_path / name} cannot be read: N" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()
