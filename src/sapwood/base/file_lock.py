"""A lock that one process holds at a time, until it gives the lock back or ends."""

from __future__ import annotations

import fcntl
from pathlib import Path


class FileLock:
    """A lock on a file. `close` gives it back; so does the system when the process ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._is_ours = False

    def try_to_take(self) -> bool:
        """Take the lock if it is free. Returns whether this object holds it now."""
        if not self._is_ours:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._is_ours = True
        return True

    def close(self) -> None:
        self._file.close()
