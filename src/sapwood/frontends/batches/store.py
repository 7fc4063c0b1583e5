"""Where files and batches are kept: rows in SQLite, contents beside it as plain files."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from sapwood.base.database import Database, Work
from sapwood.base.errors import ConfigError, InvalidRequest, NotFound

_MIGRATIONS = (
    """
    CREATE TABLE IF NOT EXISTS files (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL,
        purpose TEXT NOT NULL, expires_at INTEGER, record BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS batches (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL,
        is_open INTEGER NOT NULL, record BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS open_batches ON batches (is_open) WHERE is_open;
    """,
)

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
OPEN: frozenset[str] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
"""Statuses of batches that are not finished."""


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the API shows it; times are Unix times in seconds."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str = "processed"
    status_details: str | None = None


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class LineProblem(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    line: int | None = None
    message: str
    param: str | None = None


class Problems(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[LineProblem] = []


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as the API shows it; times are Unix times in seconds."""

    id: str
    object: str = "batch"
    endpoint: str
    model: str
    errors: Problems | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = Counts()
    usage: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None


class BatchRecord(Batch, frozen=True, kw_only=True):
    """A batch as the store keeps it.

    results_id      id of the file that gathers the answers; at the end it is the output_file_id
    failures_id     id of the file that gathers the failures; at the end it is the error_file_id
    results_live_s  seconds for which both files are kept; None: until somebody deletes them
    """

    results_id: str
    failures_id: str
    results_live_s: int | None = None

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    def shown(self) -> dict[str, Any]:
        return {name: msgspec.to_builtins(getattr(self, name)) for name in Batch.__struct_fields__}


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    object: str
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    deleted: bool


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    object: str
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


_file = msgspec.json.Decoder(File).decode
_batch = msgspec.json.Decoder(BatchRecord).decode


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


class BatchStore:
    """Files and batches of one server, in one directory; ConfigError if it cannot be written.

    changed  set when a batch has been made or cancelled, so that the runner looks at once
    """

    def __init__(self, directory: Path) -> None:
        self._contents = directory / "files"
        try:
            self._contents.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the directory {directory} cannot be made: {error}; choose another --state-dir"
            ) from error
        self._database = Database(directory / "batches.sqlite", _MIGRATIONS)
        self.lock_path = directory / "batches.lock"
        self.changed = asyncio.Event()

    def close(self) -> None:
        self._database.close()

    # ---- files -------------------------------------------------------------------------------

    def path_of(self, file_id: str) -> Path:
        """The file's path. The id must come from this store: any other could name any path."""
        return self._contents / file_id

    async def add_file(
        self, content: IO[bytes], *, filename: str, purpose: str, lives_s: int | None = None
    ) -> File:
        """Copy the content into the store.

        lives_s  seconds until the file is deleted; None: never
        """
        file_id = new_id("file-")
        path = self.path_of(file_id)
        try:
            await asyncio.to_thread(_copy, content, path)
            return await self.add_written(
                file_id, filename=filename, purpose=purpose, lives_s=lives_s
            )
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    async def add_written(
        self, file_id: str, *, filename: str, purpose: str, lives_s: int | None = None
    ) -> File:
        """Record a file whose content is at `path_of` already. Recording it twice does no harm."""
        now = int(time.time())
        record = File(
            id=file_id,
            bytes=self.path_of(file_id).stat().st_size,
            created_at=now,
            expires_at=None if lives_s is None else now + lives_s,
            filename=filename,
            purpose=purpose,
        )
        values = (record.id, purpose, record.expires_at, msgspec.json.encode(record))

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO files (id, purpose, expires_at, record) "
                "VALUES (?, ?, ?, ?)",
                values,
            )

        await self._database.run(insert)
        return record

    async def file(self, file_id: str) -> File:
        """NotFound if there is none."""
        row = await self._database.run(_one("SELECT record FROM files WHERE id = ?", file_id))
        if row is None:
            raise NotFound(f"there is no file {file_id[:80]!r}", param="file_id")
        return _file(row[0])

    async def files(
        self, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> list[File]:
        """At most `limit` files, beginning behind the one with the id `after`."""
        rows = await self._database.run(
            _listing(
                "files",
                after=after,
                limit=limit,
                newest_first=newest_first,
                where="purpose = ?" if purpose else "1",
                values=(purpose,) if purpose else (),
            )
        )
        return [_file(record) for (record,) in rows]

    async def delete_file(self, file_id: str) -> None:
        """Delete a file. Raises NotFound, and InvalidRequest if an open batch reads the file."""

        def delete(connection: sqlite3.Connection) -> None:
            for (record,) in connection.execute("SELECT record FROM batches WHERE is_open"):
                batch = _batch(record)
                if file_id == batch.input_file_id:
                    raise InvalidRequest(
                        f"the file {file_id!r} is the input of {batch.id}, which is "
                        f"{batch.status}; cancel the batch first, or wait for its end",
                        param="file_id",
                    )
            if connection.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount == 0:
                raise NotFound(f"there is no file {file_id[:80]!r}", param="file_id")

        await self._database.run(delete)
        await asyncio.to_thread(self.path_of(file_id).unlink, missing_ok=True)

    async def delete_expired(self) -> None:
        """Delete the files whose time is over, except for the inputs of open batches."""
        now = int(time.time())

        def delete(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute("SELECT record FROM batches WHERE is_open")
            in_use = {_batch(record).input_file_id for (record,) in rows}
            over = connection.execute("SELECT id FROM files WHERE expires_at <= ?", (now,))
            ids = [file_id for (file_id,) in over if file_id not in in_use]
            connection.executemany(
                "DELETE FROM files WHERE id = ?", [(file_id,) for file_id in ids]
            )
            return ids

        for file_id in await self._database.run(delete):
            self.path_of(file_id).unlink(missing_ok=True)

    # ---- batches -----------------------------------------------------------------------------

    async def add_batch(self, record: BatchRecord) -> None:
        values = (record.id, record.is_open, msgspec.json.encode(record))

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO batches (id, is_open, record) VALUES (?, ?, ?)", values)

        await self._database.run(insert)
        self.changed.set()

    async def batch(self, batch_id: str) -> BatchRecord:
        """NotFound if there is none."""
        row = await self._database.run(_one("SELECT record FROM batches WHERE id = ?", batch_id))
        if row is None:
            raise NotFound(f"there is no batch {batch_id[:80]!r}", param="batch_id")
        return _batch(row[0])

    async def batches(self, *, after: str | None, limit: int) -> list[BatchRecord]:
        """The newest first, at most `limit`, beginning behind the one with the id `after`."""
        rows = await self._database.run(
            _listing("batches", after=after, limit=limit, newest_first=True)
        )
        return [_batch(record) for (record,) in rows]

    async def open_batches(self) -> list[BatchRecord]:
        """The batches that are not finished, oldest first."""

        def select(connection: sqlite3.Connection) -> list[Any]:
            query = "SELECT record FROM batches WHERE is_open ORDER BY number"
            return connection.execute(query).fetchall()

        return [_batch(record) for (record,) in await self._database.run(select)]

    async def update_batch(
        self, batch_id: str, change: Callable[[BatchRecord], BatchRecord]
    ) -> BatchRecord:
        """Replace a batch's record by the result of `change`, in one transaction."""

        def update(connection: sqlite3.Connection) -> BatchRecord:
            query = "SELECT record FROM batches WHERE id = ?"
            row = connection.execute(query, (batch_id,)).fetchone()
            if row is None:
                raise NotFound(f"there is no batch {batch_id[:80]!r}", param="batch_id")
            record = change(_batch(row[0]))
            connection.execute(
                "UPDATE batches SET is_open = ?, record = ? WHERE id = ?",
                (record.is_open, msgspec.json.encode(record), batch_id),
            )
            return record

        return await self._database.run(update)


def _copy(content: IO[bytes], path: Path) -> None:
    content.seek(0)
    with path.open("xb") as target:
        shutil.copyfileobj(content, target, 2**20)


def _one(query: str, value: str) -> Work[Any]:
    return lambda connection: connection.execute(query, (value,)).fetchone()


def _listing(
    table: str,
    *,
    after: str | None,
    limit: int,
    newest_first: bool,
    where: str = "1",
    values: tuple[str, ...] = (),
) -> Work[list[Any]]:
    def select(connection: sqlite3.Connection) -> list[Any]:
        bounds: tuple[int, ...] = ()
        condition = where
        if after is not None:
            query = f"SELECT number FROM {table} WHERE id = ?"
            row = connection.execute(query, (after,)).fetchone()
            if row is None:
                raise InvalidRequest(f"after is {after[:80]!r}, which is not there", param="after")
            bounds = (row[0],)
            condition += f" AND number {'<' if newest_first else '>'} ?"
        order = "DESC" if newest_first else "ASC"
        query = f"SELECT record FROM {table} WHERE {condition} ORDER BY number {order} LIMIT ?"
        return connection.execute(query, (*values, *bounds, limit)).fetchall()

    return select
