"""The requests of the last minutes, kept so that a crash can be looked into and repeated."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import orjson

log = logging.getLogger(__name__)

KEPT_S = 300.0
MAX_KEPT_CHARS = 64 * 2**20
"""Characters of prompts and outputs together; beyond, the oldest ended requests are forgotten."""

Record = dict[str, Any]


class RecentRequests:
    """Open requests, and those that ended in the last five minutes."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._open: dict[int, Callable[[], Record]] = {}
        self._ended: deque[tuple[float, int, Record]] = deque()
        self._num_chars = 0

    def begin(self, key: int, record: Callable[[], Record]) -> None:
        """Keep a request; `record` returns all that is known about it at the time of the call."""
        self._open[key] = record

    def end(self, key: int, record: Record) -> None:
        del self._open[key]
        size = sum(len(record.get(name) or ()) for name in ("prompt", "text"))
        self._ended.append((self._now_s(), size, record))
        self._num_chars += size
        self._forget()

    def records(self) -> list[Record]:
        """Records of ended requests, in the order in which they ended, and then of open ones."""
        self._forget()
        return [record for _, _, record in self._ended] + [
            record_of() for record_of in self._open.values()
        ]

    def _forget(self) -> None:
        oldest_s = self._now_s() - KEPT_S
        while self._ended and (self._ended[0][0] < oldest_s or self._num_chars > MAX_KEPT_CHARS):
            self._num_chars -= self._ended.popleft()[1]


def write_crash_dump(
    folder: Path, reason: str, records: Iterable[Record], about: Mapping[str, Any]
) -> Path | None:
    """A JSON file that only its owner can read; None, and a message, if it cannot be written.

    about  version, model and options of the server
    """
    content = {
        "reason": reason,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        **about,
        "requests": list(records),
    }
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = folder / f"crash-{stamp}-{os.getpid()}.json"
    try:
        _write_private(path, orjson.dumps(content, default=str, option=orjson.OPT_INDENT_2))
    except (OSError, orjson.JSONEncodeError) as error:
        log.error("the crash dump could not be written: %s", error)
        return None
    log.error("the requests of the last minutes are in %s", path)
    return path


class RequestDump:
    """Writes ended requests to a folder, `threshold` of them per file, one JSON object a line."""

    def __init__(self, folder: Path, threshold: int) -> None:
        self.folder = folder
        self.threshold = threshold
        self._records: list[Record] = []
        self._num_files = 0

    def add(self, record: Record) -> None:
        self._records.append(record)
        if len(self._records) >= self.threshold:
            self.flush()

    def flush(self) -> None:
        """Write the gathered requests, in a thread: thousands of prompts take a while."""
        if not self._records:
            return
        records, self._records = self._records, []
        self._num_files += 1
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        path = self.folder / f"requests-{stamp}-{os.getpid()}-{self._num_files}.jsonl"
        Thread(target=self._write, args=(path, records), name="request-dump").start()

    @staticmethod
    def _write(path: Path, records: list[Record]) -> None:
        try:
            lines = (orjson.dumps(record, default=str) + b"\n" for record in records)
            _write_private(path, b"".join(lines))
        except (OSError, orjson.JSONEncodeError) as error:
            log.error("%d requests could not be dumped: %s", len(records), error)


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
