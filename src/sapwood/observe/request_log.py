"""A line per request when it comes and when it has ended, to stdout and to hourly files."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

import orjson

log = logging.getLogger(__name__)

STDOUT = "stdout"
MAX_SHOWN = 2048
"""Characters of a prompt or an output that level 2 shows; of token ids, so many ids."""

RECEIVED, FINISHED = "request.received", "request.finished"
SCHEDULER_STATUS = "scheduler.status"


class LineSink(Protocol):
    def write(self, line: str) -> None:
        """Take one line without its end; never raises because of a full or missing disk."""
        ...

    def close(self) -> None: ...


class StreamSink:
    """Lines to a stream that others use too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            # The stream's reader is gone; requests are answered nevertheless.
            log.debug("a line of the request log was lost")

    def close(self) -> None:
        """Does nothing: the stream belongs to others, who go on using it."""


class HourlyFiles:
    """Lines to DIRECTORY/NAME-HOST-PID-YYYYMMDD-HH.log, a new file each hour of UTC.

    A line that cannot be written is dropped; of several in a row only the first is reported.
    """

    def __init__(
        self, directory: Path, name: str, *, now: Callable[[], datetime] | None = None
    ) -> None:
        self._directory = directory
        self._stem = f"{name}-{socket.gethostname()}-{os.getpid()}"
        self._now = now or _utc_now
        self._hour = ""
        self._file: TextIO | None = None
        self._is_failing = False

    def write(self, line: str) -> None:
        try:
            hour = self._now().strftime("%Y%m%d-%H")
            if self._file is None or hour != self._hour:
                self._open(hour)
            assert self._file is not None
            self._file.write(line + "\n")
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                log.warning("the request log cannot be written, lines are lost: %s", error)
            self._is_failing = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, hour: str) -> None:
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{self._stem}-{hour}.log"
        # Line buffered, so that a reader sees whole lines at once and a crash loses none.
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._hour = hour


def _utc_now() -> datetime:
    return datetime.now(UTC)


def open_sinks(targets: Sequence[str], name: str) -> list[LineSink]:
    """A sink per target: "stdout", or a directory for files whose names begin with `name`."""
    return [
        StreamSink(sys.stdout) if target == STDOUT else HourlyFiles(Path(target), name)
        for target in targets
    ]


def write_event(
    sinks: Sequence[LineSink], event: str, content: Mapping[str, Any], *, as_json: bool
) -> None:
    """One event as a line of JSON, or of text whose values are JSON."""
    timestamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    if as_json:
        line = _json({"timestamp": timestamp, "event": event, **content})
    else:
        line = f"{timestamp} {event} " + " ".join(
            f"{name}={_json(value)}" for name, value in content.items()
        )
    for sink in sinks:
        sink.write(line)


def _json(value: object) -> str:
    # Lone surrogates, which orjson refuses, come from clients; a log line must survive them.
    try:
        return orjson.dumps(value, default=str).decode()
    except (TypeError, orjson.JSONEncodeError):
        return orjson.dumps(repr(value).encode("ascii", "backslashreplace").decode()).decode()


class RequestLog:
    """Logs the events of requests. All attributes may be changed while the server runs.

    level  0: ids, lengths and times; 1: sampling parameters too; 2: the beginnings of texts too;
           3: whole texts
    """

    def __init__(
        self,
        sinks: Sequence[LineSink] = (),
        *,
        enabled: bool = False,
        level: int = 2,
        as_json: bool = False,
    ) -> None:
        self._sinks = sinks
        self.enabled = enabled
        self.level = level
        self.as_json = as_json

    @property
    def wants_text(self) -> bool:
        return self.enabled and self.level >= 2

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def received(self, request_id: str, content: Mapping[str, Any]) -> None:
        if self.enabled:
            self._write(RECEIVED, {"rid": request_id, "obj": self._shown(content)})

    def finished(
        self, request_id: str, content: Mapping[str, Any], output: Mapping[str, Any]
    ) -> None:
        if self.enabled:
            shown = {"rid": request_id, "obj": self._shown(content), "out": self._shown(output)}
            self._write(FINISHED, shown)

    def _shown(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The event without the fields that this level hides."""
        shown: dict[str, Any] = {}
        for name, value in content.items():
            if name == "sampling_params" and self.level < 1:
                continue
            if name in ("prompt", "text"):
                if self.level < 2:
                    continue
                value = _cut(value) if self.level < 3 else value
            shown[name] = value
        return shown

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        write_event(self._sinks, event, content, as_json=self.as_json)


def _cut(value: Any) -> Any:
    """The first characters of a text, or items of a list, and how many there are in all."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [_cut(item) for item in value]
    if len(value) <= MAX_SHOWN:
        return value
    rest = len(value) - MAX_SHOWN
    if isinstance(value, str):
        return f"{value[:MAX_SHOWN]}… ({rest} more characters)"
    return [*value[:MAX_SHOWN], f"… ({rest} more)"]
