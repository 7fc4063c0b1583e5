"""The engine's store of responses: a history in SQLite, and what a server generates over time."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import orjson

from sapwood.base.file_lock import FileLock
from sapwood.history.interface import Record, is_open, no_response
from sapwood.history.sqlite import SqliteHistory


class ResponseStore:
    """Responses by id, in a SQLite file or in memory.

    history         reads, adds and deletes responses
    directory       folder of the file; None: the store is in memory, and gone with the process
    retention_days  days for which a response is kept
    """

    def __init__(self, directory: Path | None, *, retention_days: float) -> None:
        path = None if directory is None else directory / "responses.sqlite"
        self.history = SqliteHistory(path, retention_days=retention_days)
        self._lock = None if path is None else FileLock(path.with_suffix(".lock"))
        # Another server on the same file may still be generating responses.
        if self._lock is None or self._lock.try_to_take():
            self.history.database.run_soon(_fail_orphans)

    def close(self) -> None:
        self.history.close()
        if self._lock is not None:
            self._lock.close()

    def replace_soon(self, record: Record, events: Sequence[bytes] | None = None) -> None:
        """Replace a record without waiting; later calls see the change. A deleted one stays so.

        events  the streamed events, for clients that ask for them again
        """
        values = (
            int(is_open(record)),
            orjson.dumps(record),
            None if events is None else b"".join(events),
            record["id"],
        )

        def update(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE responses SET is_open = ?, record = ?, events = ? WHERE id = ?", values
            )

        self.history.database.run_soon(update)

    async def events(self, response_id: str) -> bytes | None:
        """All streamed events of the response, one after the other; None if they were not kept."""

        def select(connection: sqlite3.Connection) -> tuple[bytes | None] | None:
            query = "SELECT events FROM responses WHERE id = ?"
            row: tuple[bytes | None] | None = connection.execute(query, (response_id,)).fetchone()
            return row

        row = await self.history.database.run(select)
        if row is None:
            raise no_response(response_id)
        return row[0]


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
