"""Memory that the engines of one machine share, so that pages need no connection.

The engine that wants pages has its rows in a file of /dev/shm and tells the file's name; the other
one writes there. A name from a stranger is checked: only a file that sapwood has named so, and that
belongs to the same user, is opened, and nothing is written outside of it.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"sapwood-pages-[0-9a-f]{32}")
ALIGNMENT = 4096


class OwnSegment:
    """Rows in memory that another process can write to; the file is gone when it is closed."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        """shapes  per pool (rows, bytes of a row). OSError if the system has no such memory"""
        self.begins: list[int] = []
        end = 0
        for num_rows, row_bytes in shapes:
            self.begins.append(end)
            end += -(-num_rows * row_bytes // ALIGNMENT) * ALIGNMENT
        self.name = f"sapwood-pages-{secrets.token_hex(16)}"
        self._path = FOLDER / self.name
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(handle, max(end, ALIGNMENT))
            self._memory = mmap.mmap(handle, max(end, ALIGNMENT))
        except BaseException:
            self._path.unlink()
            raise
        finally:
            os.close(handle)
        self.rows = [
            np.frombuffer(self._memory, np.uint8, num_rows * row_bytes, begin).reshape(
                num_rows, row_bytes
            )
            for (num_rows, row_bytes), begin in zip(shapes, self.begins, strict=True)
        ]

    def close(self) -> None:
        """Nobody finds it any more. Its memory is given back with its last user."""
        with suppress(FileNotFoundError):
            self._path.unlink()


class PeerSegment:
    """Rows of another process, to write to."""

    def __init__(self, name: str, begins: Sequence[int], row_bytes: Sequence[int]) -> None:
        """row_bytes  per pool. Raises OSError or ValueError if there is no such memory"""
        if _NAME.fullmatch(name) is None or len(begins) != len(row_bytes):
            raise ValueError("that is no segment of pages")
        handle = os.open(FOLDER / name, os.O_RDWR | os.O_NOFOLLOW)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
                raise ValueError("the segment belongs to somebody else")
            self._memory = mmap.mmap(handle, status.st_size)
        finally:
            os.close(handle)
        self._begins = begins
        self._row_bytes = row_bytes

    def row(self, pool: int, index: int) -> NDArray[np.uint8]:
        """ValueError if it lies outside."""
        size = self._row_bytes[pool]
        begin = self._begins[pool] + index * size
        if index < 0 or self._begins[pool] < 0 or begin + size > len(self._memory):
            raise ValueError(f"row {index} of pool {pool} lies outside of the segment")
        return np.frombuffer(self._memory, np.uint8, size, begin)
