"""A lock that one process at a time has, for as long as it lives."""

from __future__ import annotations

import fcntl
from pathlib import Path


class FileLock:
    """Given back by `close`, and by the system when the process ends in whatever way."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._is_ours = False

    def try_to_take(self) -> bool:
        """Whether this object has the lock now."""
        if not self._is_ours:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._is_ours = True
        return True

    def close(self) -> None:
        self._file.close()
