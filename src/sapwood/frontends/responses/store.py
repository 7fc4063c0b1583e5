"""The store of responses and of the inputs that they answer."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from sapwood.base.database import Database
from sapwood.base.errors import InvalidRequest, NotFound
from sapwood.base.file_lock import FileLock

_MIGRATIONS = (
    """
    CREATE TABLE IF NOT EXISTS responses (
        id TEXT PRIMARY KEY, created_at REAL NOT NULL, is_open INTEGER NOT NULL,
        previous_id TEXT, record BLOB NOT NULL, input BLOB NOT NULL, events BLOB);
    CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created_at);
    """,
)

SWEEP_EVERY_S = 600.0
DAY_S = 24 * 3600.0

Record = dict[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseStore:
    """Responses by id, in a SQLite file or in memory.

    directory       folder of the file; None: the store is in memory, and gone with the process
    retention_days  days for which a response is kept
    """

    def __init__(self, directory: Path | None, *, retention_days: float) -> None:
        path = None if directory is None else directory / "responses.sqlite"
        self._database = Database(path, _MIGRATIONS)
        self._lock = None if path is None else FileLock(path.with_suffix(".lock"))
        self._retention_s = retention_days * DAY_S
        self._swept_at = time.time()
        self._database.run_soon(self._sweep)
        # Another server on the same file may still be generating responses.
        if self._lock is None or self._lock.try_to_take():
            self._database.run_soon(_fail_orphans)

    def close(self) -> None:
        self._database.close()
        if self._lock is not None:
            self._lock.close()

    async def add(self, record: Record, items: Sequence[Mapping[str, Any]]) -> None:
        values = (
            record["id"],
            record["created_at"],
            _is_open(record),
            record["previous_response_id"],
            orjson.dumps(record),
            orjson.dumps(items),
        )

        def insert(connection: sqlite3.Connection) -> None:
            if time.time() - self._swept_at > SWEEP_EVERY_S:
                self._swept_at = time.time()
                self._sweep(connection)
            connection.execute(
                "INSERT INTO responses (id, created_at, is_open, previous_id, record, input) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )

        await self._database.run(insert)

    def replace_soon(self, record: Record, events: Sequence[bytes] | None = None) -> None:
        """Replace a record without waiting; later calls see the change. A deleted one stays so.

        events  the streamed events, for clients that ask for them again
        """
        values = (
            _is_open(record),
            orjson.dumps(record),
            None if events is None else b"".join(events),
            record["id"],
        )

        def update(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE responses SET is_open = ?, record = ?, events = ? WHERE id = ?", values
            )

        self._database.run_soon(update)

    async def record(self, response_id: str) -> Record:
        """NotFound if there is none."""
        record: Record = orjson.loads(await self._column("record", response_id))
        return record

    async def items(self, response_id: str) -> list[dict[str, Any]]:
        """The input items of the response, without those of its predecessors."""
        items: list[dict[str, Any]] = orjson.loads(await self._column("input", response_id))
        return items

    async def events(self, response_id: str) -> bytes | None:
        """All streamed events of the response, one after the other; None if they were not kept."""
        found = await self._column("events", response_id)
        return None if found is None else bytes(found)

    async def conversation(self, response_id: str) -> list[dict[str, Any]]:
        """All items of the conversation up to the end of the response, the oldest first.

        Raises NotFound, and InvalidRequest if one of its responses has not ended.
        """

        def walk(connection: sqlite3.Connection) -> list[dict[str, Any]]:
            parts: list[list[dict[str, Any]]] = []
            current: str | None = response_id
            while current is not None:
                query = "SELECT is_open, previous_id, record, input FROM responses WHERE id = ?"
                row = connection.execute(query, (current,)).fetchone()
                if row is None:
                    raise NotFound(
                        f"there is no response {current[:80]!r}; it may have been deleted",
                        param="previous_response_id",
                    )
                if row[0]:
                    raise InvalidRequest(
                        f"the response {current!r} has not ended yet; wait until it has",
                        param="previous_response_id",
                    )
                parts.append(orjson.loads(row[3]) + orjson.loads(row[2])["output"])
                current = row[1]
            return [item for part in reversed(parts) for item in part]

        return await self._database.run(walk)

    async def delete(self, response_id: str) -> None:
        def remove(connection: sqlite3.Connection) -> int:
            query = "DELETE FROM responses WHERE id = ?"
            return connection.execute(query, (response_id,)).rowcount

        if await self._database.run(remove) == 0:
            raise _no_response(response_id)

    async def _column(self, name: str, response_id: str) -> Any:
        def select(connection: sqlite3.Connection) -> Any:
            query = f"SELECT {name} FROM responses WHERE id = ?"
            return connection.execute(query, (response_id,)).fetchone()

        row = await self._database.run(select)
        if row is None:
            raise _no_response(response_id)
        return row[0]

    def _sweep(self, connection: sqlite3.Connection) -> None:
        limit = time.time() - self._retention_s
        connection.execute("DELETE FROM responses WHERE created_at < ? AND NOT is_open", (limit,))


def _is_open(record: Record) -> bool:
    return record["status"] in ("queued", "in_progress")


def _no_response(response_id: str) -> NotFound:
    return NotFound(f"there is no response {response_id[:80]!r}", param="response_id")


def _fail_orphans(connection: sqlite3.Connection) -> None:
    """Mark the responses as failed that an earlier server has left unfinished."""
    rows = connection.execute("SELECT id, record FROM responses WHERE is_open").fetchall()
    for response_id, column in rows:
        record = orjson.loads(column)
        record["status"] = "failed"
        message = "the server ended while it worked on this response; send it again"
        record["error"] = {"code": "server_error", "message": message}
        connection.execute(
            "UPDATE responses SET is_open = 0, record = ? WHERE id = ?",
            (orjson.dumps(record), response_id),
        )
