"""A run over the lines of a batch: lines in, answers out, resumable."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from sapwood.base.errors import ConfigError, EngineUnavailable, InvalidRequest, SapwoodError
from sapwood.frontends.batches.lines import (
    Line,
    Reply,
    is_failure,
    key_of_answer,
    read_line,
    refusal,
    reply,
)
from sapwood.http.in_process import Post

BUSY_WAIT_S = 0.05
"""A line that meets a full queue is asked again after this long."""

ToPost = Callable[[Line], tuple[str, dict[str, Any]]]
"""From a line to (path, body) of its request; raises SapwoodError if the line has none."""


@dataclass(slots=True)
class Tally:
    """The counts of a run so far."""

    num_lines: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_output_tokens: int = 0

    def count(self, answered: Reply) -> None:
        self.num_lines += 1
        self.num_failed += answered.has_failed
        self.num_output_tokens += answered.num_output_tokens


class LineRun:
    """One run over a batch's lines, on the engine's event loop.

    lines        (number from 1, line) of each line, blank lines left out. They are read in a
                 thread, as they are needed
    to_post      makes the request of a line
    post         sends the request
    why_gone     says why the engine does not serve, which ends the run; None: it serves
    done         keys of the lines that have an answer already
    write        receives each reply
    in_flight    number of lines that are being answered at a time
    on_line      called after each line
    """

    def __init__(
        self,
        lines: Iterable[bytes],
        *,
        to_post: ToPost,
        post: Post,
        why_gone: Callable[[], str | None],
        done: Iterable[str],
        write: Callable[[Reply], None],
        in_flight: int,
        on_line: Callable[[Tally], None] = lambda _: None,
    ) -> None:
        self.tally = Tally()
        self._to_post = to_post
        self._post = post
        self._why_gone = why_gone
        self._lines = enumerate(lines, start=1)
        self._reading = asyncio.Lock()
        self._seen: dict[str, int] = {}
        self._done = frozenset(done)
        self._write = write
        self._in_flight = in_flight
        self._on_line = on_line
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False

    async def run(self) -> Tally:
        """Answer all lines. Raises EngineUnavailable if the engine dies; written replies stay.

        A run that was stopped ends early, without an error.
        """
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._in_flight)]
        try:
            await asyncio.gather(*self._tasks)
        except asyncio.CancelledError:
            if not self._stopped:
                raise
        finally:
            self._cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        return self.tally

    def stop(self) -> None:
        """Abort the lines in flight and end `run`. May be called from any thread."""
        self._stopped = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _work(self) -> None:
        while not self._stopped and (line := await self._next()) is not None:
            answered = await answer(
                line, to_post=self._to_post, post=self._post, why_gone=self._why_gone
            )
            self._write(answered)
            self.tally.count(answered)
            self._on_line(self.tally)

    async def _next(self) -> Line | None:
        """The next line that has no answer yet."""
        async with self._reading:
            while True:
                # In a thread, because the lines may come from a pipe, as slowly as it likes.
                numbered = await asyncio.to_thread(next, self._lines, None)
                if numbered is None:
                    return None
                number, raw = numbered
                if not raw.strip():
                    continue
                line = read_line(raw, number)
                if line.key in self._done:
                    self.tally.num_skipped += 1
                    self._on_line(self.tally)
                    continue
                return self._unless_twice(line)

    def _unless_twice(self, line: Line) -> Line:
        first = self._seen.setdefault(line.key, line.number)
        return line if first == line.number else twice(line, first)


async def answer(
    line: Line, *, to_post: ToPost, post: Post, why_gone: Callable[[], str | None]
) -> Reply:
    """The reply to a line, which is asked again while the queue is full.

    Raises EngineUnavailable if the engine does not serve any more."""
    try:
        path, body = to_post(line)
    except SapwoodError as error:
        return refusal(line, error)
    while True:
        status, content = await post(path, body)
        if status != 503:
            return reply(line, status, content)
        reason = why_gone()
        if reason is not None:
            raise EngineUnavailable(
                f"the engine does not serve any more: {reason}; run the command again to go on "
                "with the lines that have no answer"
            )
        await asyncio.sleep(BUSY_WAIT_S)


def twice(line: Line, first: int) -> Line:
    """The line, refused because line `first` has the same id."""
    return line.refused(
        InvalidRequest(f"the id {line.key!r} is that of line {first} too; ids must differ")
    )


def resume(
    path: Path,
    *,
    retry_errors: bool,
    each: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> set[str]:
    """The keys of the answers in an output file, whose last line is cut off if it is incomplete.

    retry_errors  whether failed answers are removed, so that their lines are asked again
    each          called with each answer that stays
    Raises        ConfigError if the file is not the output of a batch
    """
    if not path.exists():
        return set()
    keys: set[str] = set()
    kept: list[bytes] = []
    num_bytes = 0
    with path.open("r+b") as output:
        for number, raw in enumerate(output, start=1):
            if not raw.endswith(b"\n"):
                output.truncate(num_bytes)
                break
            num_bytes += len(raw)
            answer = _answer_in(raw, path, number)
            if retry_errors and is_failure(answer):
                continue
            if retry_errors:
                kept.append(raw)
            key = key_of_answer(answer)
            if key is not None:
                keys.add(key)
            each(answer)
    if retry_errors:
        _replace(path, kept)
    return keys


def _answer_in(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        answer = orjson.loads(raw)
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict) or key_of_answer(answer) is None:
        raise ConfigError(
            f"line {number} of {path} is no answer of a batch; write to another file, or remove "
            "this one"
        )
    return answer


def _replace(path: Path, lines: list[bytes]) -> None:
    """Replace the file in one step, so that a crash leaves either the old or the new file."""
    fresh = path.with_name(f"{path.name}.tmp")
    with fresh.open("wb") as output:
        output.writelines(lines)
        output.flush()
        os.fsync(output.fileno())
    fresh.replace(path)


def numbered_lines(file: IO[bytes]) -> Iterator[bytes]:
    """(number, line) of each line; a byte order mark at the file's beginning is dropped."""
    for position, raw in enumerate(file):
        yield raw.removeprefix(b"\xef\xbb\xbf") if position == 0 else raw


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for raw in file if raw.strip())
