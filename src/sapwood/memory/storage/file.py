"""Page copies as files of one directory, which several servers may share.

A file has a header (a mark, the length, a checksum) and the bytes. It is written under a name of
its own and then renamed, so that nobody sees half of it; what a crash of the machine leaves is
found by the checksum. A copy that is read gets the time of the reading, and the oldest go first
when the directory is too large. Files with other names are left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.names import copy_of

HEADER = struct.Struct("<8sQI12x")
MARK = b"sapwdkv1"
KEPT_SHARE = 0.9
"""Of the limit, after the oldest copies went."""
TEMPORARY_S = 3600.0
"""After so many seconds a file that is being written was left behind by a process that is gone."""
_SUFFIX = ".bin"
_WRITING = re.compile(r"\.[0-9a-f]{64}_[\w.+@=-]+\.\d+-\d+\.writing")


class FileStorage:
    """A PageStorage (interface.py).

    num_bytes  of all copies, as far as this process knows
    """

    def __init__(self, directory: Path, *, max_bytes: int | None = None) -> None:
        """max_bytes  of all copies together; None: as many as the disk has room for

        Raises  StorageUnavailable if there can be no such directory"""
        self._directory = directory
        self._max_bytes = max_bytes
        self._names = itertools.count()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_left_behind()
            self.num_bytes = sum(size for _, size, _ in self.copies())
        except OSError as error:
            raise StorageUnavailable(f"{directory} cannot be used: {error.strerror}") from error
        self._num_since_scan = 0

    def batch_exists(self, keys: Sequence[str]) -> int:
        for count, key in enumerate(keys):
            if not self._path(key).is_file():
                return count
        return len(keys)

    def batch_get(self, keys: Sequence[str], into: Sequence[memoryview]) -> int:
        for count, (key, view) in enumerate(zip(keys, into, strict=True)):
            if not self._read(self._path(key), view):
                return count
        return len(keys)

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        for key, value in zip(keys, values, strict=True):
            path = self._path(key)
            if not path.exists():
                self._write(path, value)
        self._make_room()
        return len(keys)

    def clear(self) -> None:
        try:
            for name, _, _ in list(self.copies()):
                with contextlib.suppress(FileNotFoundError):
                    (self._directory / name).unlink()
        except OSError as error:
            raise StorageUnavailable(
                f"copies in {self._directory} cannot be removed: {error.strerror}"
            ) from error
        self.num_bytes = 0

    def close(self) -> None:
        pass

    def copies(self) -> Iterator[tuple[str, int, float]]:
        return copies_in(self._directory)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}{_SUFFIX}"

    def _read(self, path: Path, view: memoryview) -> bool:
        try:
            # A name may be anything by now: a pipe would be waited for.
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            header = bytearray(HEADER.size)
            size = os.fstat(file).st_size
            is_whole = size == HEADER.size + len(view) and _fill(file, [memoryview(header), view])
            if is_whole:
                mark, length, checksum = HEADER.unpack(header)
                is_whole = mark == MARK and length == len(view) and checksum == zlib.crc32(view)
            if is_whole:
                with contextlib.suppress(OSError):  # of another user, whose copy it is
                    os.utime(file)
        except OSError:
            is_whole = False
        finally:
            os.close(file)
        if not is_whole:
            with contextlib.suppress(OSError):
                path.unlink()  # so that the copy is written again
        return is_whole

    def _write(self, path: Path, value: memoryview) -> None:
        writing = self._directory / f".{path.stem}.{os.getpid()}-{next(self._names)}.writing"
        header = HEADER.pack(MARK, len(value), zlib.crc32(value))
        try:
            file = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                _write_all(file, [memoryview(header), value])
            finally:
                os.close(file)
            writing.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                writing.unlink()
            raise StorageUnavailable(
                f"a copy cannot be written to {self._directory}: {error.strerror}"
            ) from error
        size = len(header) + len(value)
        self.num_bytes += size
        self._num_since_scan += size

    def _make_room(self) -> None:
        limit = self._max_bytes
        if limit is None or (self.num_bytes <= limit and self._num_since_scan < limit // 16):
            return
        # Others may have written and removed copies too.
        self._num_since_scan = 0
        try:
            copies = sorted(self.copies(), key=lambda copy: copy[2])
            self.num_bytes = sum(size for _, size, _ in copies)
            if self.num_bytes <= limit:
                return
            for name, size, _ in copies:
                if self.num_bytes <= limit * KEPT_SHARE:
                    break
                with contextlib.suppress(FileNotFoundError):
                    (self._directory / name).unlink()
                self.num_bytes -= size
        except OSError as error:
            raise StorageUnavailable(
                f"old copies in {self._directory} cannot be removed: {error.strerror}"
            ) from error

    def _remove_left_behind(self) -> None:
        for path in self._directory.iterdir():
            if _WRITING.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.lstat().st_mtime > TEMPORARY_S:
                        path.unlink()


def copies_in(directory: Path) -> Iterator[tuple[str, int, float]]:
    """(name, bytes, time of the last use) of each copy in the directory; OSError if it cannot be
    read."""
    with os.scandir(directory) as entries:
        for entry in entries:
            is_copy = entry.name.endswith(_SUFFIX) and copy_of(entry.name.removesuffix(_SUFFIX))
            if is_copy and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    told = entry.stat(follow_symlinks=False)
                    yield entry.name, told.st_size, told.st_mtime


def _fill(file: int, views: list[memoryview]) -> bool:
    """Whether the file had enough to fill the views."""
    while views:
        count = os.readv(file, views)
        if not count:
            return False
        views = _rest(views, count)
    return True


def _write_all(file: int, views: list[memoryview]) -> None:
    while views:
        views = _rest(views, os.writev(file, views))


def _rest(views: list[memoryview], count: int) -> list[memoryview]:
    """The views without their first `count` bytes."""
    while views and count >= len(views[0]):
        count -= len(views[0])
        views = views[1:]
    return [views[0][count:], *views[1:]] if views else []
