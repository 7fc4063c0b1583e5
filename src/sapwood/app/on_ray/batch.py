"""`sapwood generate --engine ray`: the lines of a file over many engines, by Ray Data.

This process reads the file once and keeps where each unanswered line lies; the lines themselves
are read by the engines' actors, a shard at a time, and only answers come back.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.app.on_ray.library import join_cluster, load
from sapwood.base.errors import SapwoodError
from sapwood.frontends.batches.lines import Line, Reply, read_line, refusal, to_post
from sapwood.frontends.batches.run import Tally, answer, twice
from sapwood.schema.config.engine import EngineConfig

MAX_SHARDS = 10_000
"""Blocks that Ray Data keeps account of; lines of larger files come in larger shards."""
SHARDS_IN_FLIGHT = 2
"""Shards that an engine has at a time, so that it need not wait for the slowest line of one."""


@dataclass(slots=True)
class Pending:
    """Lines that need an engine: their numbers from 1, and where they begin in the file.

    refused  replies to lines that need none, because they are wrong
    """

    numbers: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    refused: list[Reply] = field(default_factory=list)
    num_skipped: int = 0


def find_pending(source: Path, done: set[str]) -> Pending:
    """The lines of the file that have no answer yet.

    done  keys of the lines that have one
    """
    found, seen = Pending(), dict[str, int]()
    for number, offset, line in _lines(source):
        if line.key in done:
            found.num_skipped += 1
            continue
        first = seen.setdefault(line.key, number)
        checked = line if first == number else twice(line, first)
        if checked.error is not None:
            found.refused.append(refusal(checked, checked.error))
            continue
        found.numbers.append(number)
        found.offsets.append(offset)
    return found


def _lines(source: Path) -> Iterator[tuple[int, int, Line]]:
    """(number, offset, line) of each line that is not blank."""
    offset = 0
    with source.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, offset, read_line(_plain(raw, number), number)
            offset += len(raw)


def _plain(raw: bytes, number: int) -> bytes:
    """The line without a byte order mark at the file's beginning."""
    return raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


class Answerer:
    """An engine in an actor of Ray Data, which answers the lines of shards."""

    def __init__(self, config: EngineConfig, source: str, in_flight: int) -> None:
        from sapwood.app.cli.engine import open_llm
        from sapwood.frontends.server import create_app
        from sapwood.http.in_process import in_process

        self._source = source
        self._room = asyncio.Semaphore(in_flight)
        self._llm = open_llm(config)
        self._post = in_process(create_app(self._llm.services))

    def __call__(self, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Columns numbers and offsets (of one shard's lines) -> reply, tokens and failed."""
        replies = self._llm.run(self._answer(shard["number"], shard["offset"]))
        return {
            "reply": np.array([one.encoded for one in replies], dtype=object),
            "tokens": np.array([one.num_output_tokens for one in replies]),
            "failed": np.array([one.has_failed for one in replies]),
        }

    async def _answer(self, numbers: Any, offsets: Any) -> list[Reply]:
        lines = await asyncio.to_thread(self._read, numbers, offsets)
        return await asyncio.gather(*map(self._reply, lines))

    async def _reply(self, line: Line) -> Reply:
        services = self._llm.services
        async with self._room:
            return await answer(
                line,
                to_post=lambda one: to_post(one, services),
                post=self._post,
                why_gone=lambda: services.engine.unavailable_reason,
            )

    def _read(self, numbers: Any, offsets: Any) -> list[Line]:
        lines: list[Line] = []
        with Path(self._source).open("rb") as file:
            for number, offset in zip(numbers, offsets, strict=True):
                file.seek(int(offset))
                lines.append(read_line(_plain(file.readline(), int(number)), int(number)))
        return lines


def answer_all(
    pending: Pending,
    source: Path,
    config: EngineConfig,
    *,
    address: str | None,
    num_engines: int,
    in_flight: int,
    write: Callable[[bytes], None],
    on_line: Callable[[Tally], None],
    is_stopped: Callable[[], bool],
) -> Tally:
    """Answer the lines on a Ray cluster, in the order in which they are ready.

    address      of the cluster; None: one on this machine, for this run
    num_engines  actors with an engine each
    in_flight    lines that an engine has at a time
    write        receives each answer, as a line
    is_stopped   asked after each shard; True ends the run
    Raises       SapwoodError if an engine cannot start, or fails
    """
    tally = Tally(num_skipped=pending.num_skipped)
    for refused in pending.refused:
        write(refused.encoded)
        tally.count(refused)
        on_line(tally)
    if not pending.numbers:
        return tally
    ray, data = join_cluster(address), load("ray.data")
    data.DataContext.get_current().enable_progress_bars = False
    if config.execution.num_threads is None:
        cores = int(ray.cluster_resources().get("CPU", 1))
        threads = max(1, cores // num_engines)
        config = replace(config, execution=replace(config.execution, num_threads=threads))
    try:
        answers = data.from_arrow(_shards(pending, in_flight // SHARDS_IN_FLIGHT)).map_batches(
            Answerer,
            fn_constructor_args=(config, os.fspath(source.absolute()), in_flight),
            batch_size=None,
            num_cpus=config.execution.num_threads,
            compute=data.ActorPoolStrategy(
                size=num_engines,
                max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT,
                max_concurrent_calls_per_actor=SHARDS_IN_FLIGHT,
                enable_true_multi_threading=True,
            ),
        )
        for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
            for line, num_tokens, failed in zip(
                batch["reply"], batch["tokens"], batch["failed"], strict=True
            ):
                write(line)
                tally.num_lines += 1
                tally.num_failed += int(failed)
                tally.num_output_tokens += int(num_tokens)
                on_line(tally)
            if is_stopped():
                break
    except ray.exceptions.RayError as error:
        raise SapwoodError(f"the engines on the Ray cluster failed: {error}") from error
    finally:
        ray.shutdown()
    return tally


def _shards(pending: Pending, size: int) -> list[Any]:
    """Tables of some lines each: a block of the dataset, and so one call of an actor."""
    table = load("pyarrow").table
    count = len(pending.numbers)
    step = max(1, size, -(-count // MAX_SHARDS))
    numbers, offsets = np.asarray(pending.numbers), np.asarray(pending.offsets)
    return [
        table({"number": numbers[at : at + step], "offset": offsets[at : at + step]})
        for at in range(0, count, step)
    ]
