"""Memory that the engines of one machine share, so that pages need no connection.

The engine that wants pages has its rows in a file without a path (memfd) and tells its process and
the file's number there; the other one opens that and writes. So nothing is left behind, however a
process ends. What a stranger names is checked: only a file that sapwood has made so, that belongs
to the same user and that can no longer shrink is opened, and nothing is written outside of it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

_NAME = re.compile(r"sapwood-pages-[0-9a-f]{32}")
ALIGNMENT = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment(msgspec.Struct, frozen=True):
    """Where another process finds the memory.

    process, handle  the process that has it, and the file's number there
    begins           per pool the byte at which its rows begin
    """

    name: str
    process: int
    handle: int
    begins: tuple[int, ...]


class OwnSegment:
    """Rows in memory that another process can write to."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        """shapes  per pool (rows, bytes of a row). OSError if the system has no such memory"""
        begins: list[int] = []
        end = 0
        for num_rows, row_bytes in shapes:
            begins.append(end)
            end += -(-num_rows * row_bytes // ALIGNMENT) * ALIGNMENT
        end = max(end, ALIGNMENT)
        name = f"sapwood-pages-{secrets.token_hex(16)}"
        handle = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(handle, end)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(handle, end)
        except BaseException:
            os.close(handle)
            raise
        self.place = Segment(name, os.getpid(), handle, tuple(begins))
        self.rows = [
            np.frombuffer(memory, np.uint8, num_rows * row_bytes, begin).reshape(
                num_rows, row_bytes
            )
            for (num_rows, row_bytes), begin in zip(shapes, begins, strict=True)
        ]

    def close(self) -> None:
        """Nobody finds it any more. The memory is given back with its last user."""
        os.close(self.place.handle)


class PeerSegment:
    """Rows of another process, to write to."""

    def __init__(self, place: Segment, row_bytes: Sequence[int]) -> None:
        """row_bytes  per pool. Raises OSError or ValueError if there is no such memory"""
        if _NAME.fullmatch(place.name) is None or len(place.begins) != len(row_bytes):
            raise ValueError("that is no segment of pages")
        path = f"/proc/{place.process:d}/fd/{place.handle:d}"
        if str(Path(path).readlink()) != f"/memfd:{place.name} (deleted)":
            raise ValueError("the process has another file there")
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
                raise ValueError("the segment belongs to somebody else")
            if not fcntl.fcntl(handle, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ValueError("the segment may shrink")
            self._memory = mmap.mmap(handle, status.st_size)
        finally:
            os.close(handle)
        self._begins = place.begins
        self._row_bytes = row_bytes

    def row(self, pool: int, index: int) -> NDArray[np.uint8]:
        """ValueError if it lies outside."""
        size = self._row_bytes[pool]
        begin = self._begins[pool] + index * size
        if index < 0 or self._begins[pool] < 0 or begin + size > len(self._memory):
            raise ValueError(f"row {index} of pool {pool} lies outside of the segment")
        return np.frombuffer(self._memory, np.uint8, size, begin)
