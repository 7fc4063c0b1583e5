"""Runs the batches of a store, beside live traffic and below it.

A batch's progress is in its two result files: a line with an answer there is done. So a server that
starts again goes on where the last one stopped, however that ended. Of several servers with one
directory, the holder of the directory's lock runs the batches; another takes over when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from msgspec.structs import replace

from sapwood.base.errors import InvalidRequest, SapwoodError
from sapwood.base.file_lock import FileLock
from sapwood.frontends.batches.lines import (
    Line,
    Reply,
    key_of_answer,
    openai_post,
    read_line,
    refusal,
)
from sapwood.frontends.batches.run import LineRun, numbered_lines, resume
from sapwood.frontends.batches.store import (
    BatchRecord,
    BatchStore,
    Counts,
    LineProblem,
    Problems,
)
from sapwood.frontends.batches.usage import BatchUsage
from sapwood.frontends.serving.services import Services
from sapwood.http.in_process import Post

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often to look at the clock, and at the store, which another server may have changed."""
AT_ONCE = 8
"""Batches that run at the same time and share the lines in flight; further batches wait."""
SAVE_EVERY_S = 0.5
ENGINE_WAIT_S = 0.5
MAX_PROBLEMS = 100
"""Bad lines that a batch's errors list; one is enough for it to fail."""


class BatchRunner:
    """Works on all open batches until `run` is cancelled; no finished answer is lost then.

    post         sends a request to this server's own application
    concurrency  lines, of all batches together, that are being answered at a time
    priority     priority of the lines' requests
    """

    def __init__(
        self,
        store: BatchStore,
        services: Services,
        post: Post,
        *,
        concurrency: int,
        priority: int,
    ) -> None:
        self._store = store
        self._services = services
        self._ask = post
        self._concurrency = concurrency
        self.priority = priority
        self._turns = asyncio.Semaphore(concurrency)
        self._jobs: dict[str, _Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        with closing(FileLock(self._store.lock_path)) as lock:
            try:
                while True:
                    self._store.changed.clear()
                    if lock.try_to_take():
                        await self._look()
                    try:
                        async with asyncio.timeout(LOOK_EVERY_S):
                            await self._store.changed.wait()
                    except TimeoutError:
                        continue
            finally:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _look(self) -> None:
        """Start new batches, and stop those that were cancelled or whose time is up."""
        await self._store.delete_expired()
        for record in await self._store.open_batches():
            job = self._jobs.get(record.id)
            if job is not None:
                is_late = time.time() >= record.expires_at and record.status == "in_progress"
                if record.status == "cancelling" or is_late:
                    job.stop()
            elif len(self._tasks) < AT_ONCE:
                self._start(record)

    def _start(self, record: BatchRecord) -> None:
        job = _Job(self._store, record, self._run_lines)
        self._jobs[record.id] = job
        task = self._tasks[record.id] = asyncio.create_task(job.run())

        def ended(task: asyncio.Task[None]) -> None:
            del self._jobs[record.id], self._tasks[record.id]
            # Now the next batch may start.
            self._store.changed.set()
            if not task.cancelled() and task.exception() is not None:
                log.error("batch %s stopped", record.id, exc_info=task.exception())

        task.add_done_callback(ended)

    def _run_lines(self, record: BatchRecord, progress: _Progress, source: IO[bytes]) -> LineRun:
        return LineRun(
            numbered_lines(source),
            to_post=lambda line: self._to_post(line, record.endpoint),
            post=self._post,
            why_gone=lambda: None,
            done=progress.done,
            write=progress.write,
            in_flight=self._concurrency,
        )

    def _to_post(self, line: Line, endpoint: str) -> tuple[str, dict[str, Any]]:
        path, body = checked_line(line, endpoint)
        return path, {**body, "priority": self.priority}

    async def _post(self, path: str, body: dict[str, Any], /) -> tuple[int, bytes]:
        async with self._turns:
            # Lines wait while the engine starts or restarts; a server that ends cancels them.
            while self._services.engine.unavailable_reason is not None:
                await asyncio.sleep(ENGINE_WAIT_S)
            return await self._ask(path, body)


class _Job:
    """Runs one batch from its present state to its end."""

    def __init__(
        self,
        store: BatchStore,
        record: BatchRecord,
        make_run: Callable[[BatchRecord, _Progress, IO[bytes]], LineRun],
    ) -> None:
        self._store = store
        self._record = record
        self._make_run = make_run
        self._run: LineRun | None = None
        self._is_stopped = False

    def stop(self) -> None:
        """Answer no further line; the batch's record says why."""
        self._is_stopped = True
        if self._run is not None:
            self._run.stop()

    async def run(self) -> None:
        try:
            if self._record.status == "validating":
                await self._validate()
            if self._record.is_open:
                await self._answer()
        except (OSError, SapwoodError) as error:
            # For instance a full disk, or a removed input file. Other batches go on.
            log.exception("batch %s failed", self._record.id)
            await self._fail([LineProblem(code="server_error", message=str(error))])

    async def _validate(self) -> None:
        path = self._store.path_of(self._record.input_file_id)
        total, problems = await asyncio.to_thread(validate, path, self._record.endpoint)
        if problems:
            await self._fail(problems)
            return

        def begun(record: BatchRecord) -> BatchRecord:
            counts = Counts(total=total)
            if record.status != "validating":
                return replace(record, request_counts=counts)
            now = int(time.time())
            return replace(record, status="in_progress", in_progress_at=now, request_counts=counts)

        await self._change(begun)

    async def _answer(self) -> None:
        results, failures = (
            self._store.path_of(file_id)
            for file_id in (self._record.results_id, self._record.failures_id)
        )
        progress = await asyncio.to_thread(_Progress, results, failures)
        try:
            if self._record.status == "in_progress":
                await self._answer_lines(progress)
            await self._refresh()
            is_late = self._record.status == "in_progress" and self._is_stopped
            if is_late:
                await self._give_up(progress)
        finally:
            progress.close()
            await self._save(progress)
        await self._finish(progress, is_late=is_late)

    async def _answer_lines(self, progress: _Progress) -> None:
        with self._store.path_of(self._record.input_file_id).open("rb") as source:
            self._run = run = self._make_run(self._record, progress, source)
            if self._is_stopped:
                run.stop()
            saving = asyncio.create_task(self._save_often(progress))
            try:
                await run.run()
            finally:
                saving.cancel()
                await asyncio.gather(saving, return_exceptions=True)

    async def _save_often(self, progress: _Progress) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            await self._save(progress)

    async def _save(self, progress: _Progress) -> None:
        await self._change(
            lambda record: replace(
                record,
                request_counts=replace(
                    record.request_counts,
                    completed=progress.num_completed,
                    failed=progress.num_failed,
                ),
                usage=progress.usage.shown(),
            )
        )

    async def _give_up(self, progress: _Progress) -> None:
        """Write an error for every line without an answer, because the batch's time is up."""
        error = InvalidRequest("the batch's completion window ended before this line was answered")

        def write() -> None:
            with self._store.path_of(self._record.input_file_id).open("rb") as source:
                for number, raw in enumerate(numbered_lines(source), start=1):
                    line = read_line(raw, number) if raw.strip() else None
                    if line is not None and line.key not in progress.done:
                        progress.write(refusal(line, error, code="batch_expired"))

        await asyncio.to_thread(write)

    async def _finish(self, progress: _Progress, *, is_late: bool) -> None:
        def finalizing(record: BatchRecord) -> BatchRecord:
            if record.status == "finalizing":
                return record
            if record.status == "in_progress" and not is_late:
                return replace(record, status="finalizing", finalizing_at=int(time.time()))
            return record

        await self._change(finalizing)
        output_id = await self._publish(progress.num_completed, self._record.results_id, "output")
        error_id = await self._publish(progress.num_failed, self._record.failures_id, "error")

        def ended(record: BatchRecord) -> BatchRecord:
            record = replace(record, output_file_id=output_id, error_file_id=error_id)
            now = int(time.time())
            if record.status == "cancelling":
                return replace(record, status="cancelled", cancelled_at=now)
            if record.status == "in_progress":
                return replace(record, status="expired", expired_at=now)
            return replace(record, status="completed", completed_at=now)

        await self._change(ended)

    async def _publish(self, num_lines: int, file_id: str, kind: str) -> str | None:
        """Let clients read a result file, and return its id; None if the file is empty."""
        if num_lines == 0:
            self._store.path_of(file_id).unlink(missing_ok=True)
            return None
        await self._store.add_written(
            file_id,
            filename=f"{self._record.id}_{kind}.jsonl",
            purpose="batch_output",
            lives_s=self._record.results_live_s,
        )
        return file_id

    async def _fail(self, problems: list[LineProblem]) -> None:
        def failed(record: BatchRecord) -> BatchRecord:
            if record.status == "cancelling":
                return replace(record, status="cancelled", cancelled_at=int(time.time()))
            return replace(
                record,
                status="failed",
                failed_at=int(time.time()),
                errors=Problems(data=problems),
            )

        await self._change(failed)

    async def _refresh(self) -> None:
        self._record = await self._store.batch(self._record.id)

    async def _change(self, change: Callable[[BatchRecord], BatchRecord]) -> None:
        self._record = await self._store.update_batch(self._record.id, change)


class _Progress:
    """The two result files of a batch, which show which lines are done."""

    def __init__(self, results: Path, failures: Path) -> None:
        self.usage = BatchUsage()
        answered = resume(results, retry_errors=False, each=self._count_old)
        failed = resume(failures, retry_errors=False)
        self.done = answered | failed
        self.num_completed, self.num_failed = len(answered), len(failed)
        self._results = results.open("ab")
        self._failures = failures.open("ab")

    def write(self, reply: Reply) -> None:
        """Write a reply and hand it to the system at once, so that a crash here loses nothing."""
        file = self._failures if reply.has_failed else self._results
        file.write(reply.encoded)
        file.flush()
        key = key_of_answer(reply.answer)
        if key is not None:
            self.done.add(key)
        if reply.has_failed:
            self.num_failed += 1
        else:
            self.num_completed += 1
            self.usage.add(reply.usage)

    def close(self) -> None:
        self._results.close()
        self._failures.close()

    def _count_old(self, answer: Mapping[str, Any]) -> None:
        body = answer["response"]["body"]
        self.usage.add(body.get("usage") or {})


def checked_line(line: Line, endpoint: str) -> tuple[str, dict[str, Any]]:
    """(path, body) of a batch's line; raises SapwoodError if it is no request to the endpoint."""
    if line.error is not None:
        raise line.error
    path, body = openai_post(line.given, (endpoint,))
    if body.get("priority") is not None:
        raise InvalidRequest(
            "body.priority has no place in a batch, whose lines come behind all other requests; "
            "leave it out",
            param="priority",
        )
    return path, body


def validate(path: Path, endpoint: str) -> tuple[int, list[LineProblem]]:
    """(number of lines, problems of the first bad lines). Slow: call this in a thread."""
    problems: list[LineProblem] = []
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(numbered_lines(file), start=1):
            if not raw.strip():
                continue
            line = read_line(raw, number)
            first = seen.setdefault(line.key, number)
            problem = _problem(line, endpoint, first)
            if problem is not None and len(problems) < MAX_PROBLEMS:
                problems.append(problem)
    if not seen:
        problems.append(LineProblem(code="empty_file", message="the input file has no lines"))
    return len(seen), problems


def _problem(line: Line, endpoint: str, first: int) -> LineProblem | None:
    if first != line.number:
        message = f"the custom_id {line.key!r} is that of line {first} too; ids must differ"
        return LineProblem(
            code="duplicate_custom_id", line=line.number, message=message, param="custom_id"
        )
    try:
        checked_line(line, endpoint)
    except SapwoodError as error:
        code = "invalid_json_line" if line.error is not None else "invalid_request"
        return LineProblem(code=code, line=line.number, message=error.message, param=error.param)
    return None
