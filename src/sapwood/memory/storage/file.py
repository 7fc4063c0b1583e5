"""Page copies as files of one directory, which several servers may share.

A file has a header (a mark, the length, a checksum) and the bytes. It is written under a name of
its own and then renamed, so that nobody sees half of it; what a crash of the machine leaves is
found by the checksum. A copy that is read gets the time of the reading, and the oldest go first
when the directory is too large. Files with other names are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

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


Move = tuple[int, int, memoryview]
"""An open file, a place in it, and the memory that is read or written there."""


class FileMoves(Protocol):
    """Moves bytes between files and memory. For any thread.

    most_copies  how many copies it is given at once"""

    most_copies: int

    def read(self, moves: Sequence[Move]) -> None:
        """Fill the memory. Raises OSError if one of the files has too little or cannot be read,
        StorageUnavailable if nothing can."""
        ...

    def write(self, moves: Sequence[Move]) -> None:
        """Raises OSError or StorageUnavailable if something cannot be written."""
        ...


class PlainMoves:
    """FileMoves by the system's calls."""

    most_copies = 1

    def read(self, moves: Sequence[Move]) -> None:
        for file, offset, views in _together(moves):
            while views:
                count = os.preadv(file, views, offset)
                if not count:
                    raise OSError(errno.EIO, "the file ends too early")
                offset += count
                views = _rest(views, count)

    def write(self, moves: Sequence[Move]) -> None:
        for file, offset, views in _together(moves):
            while views:
                count = os.pwritev(file, views, offset)
                offset += count
                views = _rest(views, count)


class FileStorage:
    """A PageStorage (interface.py).

    num_bytes  of all copies, as far as this process knows
    """

    def __init__(
        self, directory: Path, *, max_bytes: int | None = None, moves: FileMoves | None = None
    ) -> None:
        """max_bytes  of all copies together; None: as many as the disk has room for

        Raises  StorageUnavailable if there can be no such directory"""
        self._directory = directory
        self._moves = PlainMoves() if moves is None else moves
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
        most = self._moves.most_copies
        for start in range(0, len(keys), most):
            paths = [self._path(key) for key in keys[start : start + most]]
            count = self._read(paths, into[start : start + most])
            if count < len(paths):
                return start + count
        return len(keys)

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        named = zip(map(self._path, keys), values, strict=True)
        new = [(path, value) for path, value in named if not path.exists()]
        for start in range(0, len(new), self._moves.most_copies):
            self._write(new[start : start + self._moves.most_copies])
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

    def _read(self, paths: Sequence[Path], into: Sequence[memoryview]) -> int:
        """Fill the views at once; returns how many are whole copies, from the first on."""
        files: list[int] = []
        try:
            for path, view in zip(paths, into, strict=True):
                file = _opened(path, HEADER.size + len(view))
                if file is None:
                    break
                files.append(file)
            headers = [memoryview(bytearray(HEADER.size)) for _ in files]
            moves = [
                move
                for file, header, view in zip(files, headers, into, strict=False)
                for move in ((file, 0, header), (file, HEADER.size, view))
            ]
            try:
                self._moves.read(moves)
            except OSError:
                headers = [memoryview(bytes(HEADER.size)) for _ in files]
            for count, (file, header, view) in enumerate(zip(files, headers, into, strict=False)):
                mark, length, checksum = HEADER.unpack(header)
                if mark != MARK or length != len(view) or checksum != zlib.crc32(view):
                    _remove(paths[count])
                    return count
                with contextlib.suppress(OSError):  # of another user, whose copy it is
                    os.utime(file)
        finally:
            for file in files:
                os.close(file)
        return len(files)

    def _write(self, copies: Sequence[tuple[Path, memoryview]]) -> None:
        """Write the copies at once, each under another name until all of its bytes are there."""
        names = [
            self._directory / f".{path.stem}.{os.getpid()}-{next(self._names)}.writing"
            for path, _ in copies
        ]
        files: list[int] = []
        try:
            try:
                moves: list[Move] = []
                for name, (_, value) in zip(names, copies, strict=True):
                    files.append(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                    header = HEADER.pack(MARK, len(value), zlib.crc32(value))
                    moves += [
                        (files[-1], 0, memoryview(header)),
                        (files[-1], HEADER.size, value),
                    ]
                self._moves.write(moves)
            finally:
                for file in files:
                    os.close(file)
            for name, (path, value) in zip(names, copies, strict=True):
                name.replace(path)
                self.num_bytes += HEADER.size + len(value)
                self._num_since_scan += HEADER.size + len(value)
        except (OSError, StorageUnavailable) as error:
            for name in names:
                _remove(name)
            if isinstance(error, StorageUnavailable):
                raise
            raise StorageUnavailable(
                f"a copy cannot be written to {self._directory}: {error.strerror}"
            ) from error

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


def _opened(path: Path, num_bytes: int) -> int | None:
    """The open file, if it has so many bytes; one that has not is removed, so that the copy is
    written again."""
    try:
        # A name may be anything by now: a pipe would be waited for.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode) and status.st_size == num_bytes:
        return file
    os.close(file)
    _remove(path)
    return None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _together(moves: Sequence[Move]) -> Iterator[tuple[int, int, list[memoryview]]]:
    """The same, moves that follow each other in one file as one."""
    whole: tuple[int, int, list[memoryview]] | None = None
    for file, offset, view in moves:
        if whole is not None and whole[0] == file and whole[1] + _length(whole[2]) == offset:
            whole[2].append(view)
            continue
        if whole is not None:
            yield whole
        whole = (file, offset, [view])
    if whole is not None:
        yield whole


def _length(views: Sequence[memoryview]) -> int:
    return sum(len(view) for view in views)


def _rest(views: list[memoryview], count: int) -> list[memoryview]:
    """The views without their first `count` bytes."""
    while views and count >= len(views[0]):
        count -= len(views[0])
        views = views[1:]
    return [views[0][count:], *views[1:]] if views else []
