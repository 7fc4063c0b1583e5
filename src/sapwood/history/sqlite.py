"""SQLite as the database of a history."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapwood.base.database import Database
from sapwood.history.sql import MIGRATIONS, SqlHistory, Statement


class SqliteRows:
    """The SqlRows of a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def fetch(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        def select(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
            return connection.execute(query, _by_number(values)).fetchall()

        return await self._database.run(select)

    async def change(self, statements: Sequence[Statement]) -> list[int]:
        return await self._database.run(lambda connection: changed(connection, statements))


class SqliteHistory(SqlHistory):
    """A History (interface.py) in a SQLite file or in memory.

    path            the file; None: the history is in memory, and gone with the process
    retention_days  for which responses are kept, and conversations after their last use
    """

    def __init__(self, path: Path | None, *, retention_days: float) -> None:
        self.database = Database(path, MIGRATIONS)
        super().__init__(SqliteRows(self.database), retention_days=retention_days)
        sweeps = self.sweeps()

        def sweep(connection: sqlite3.Connection) -> None:
            changed(connection, sweeps)

        self.database.run_soon(sweep)

    def close(self) -> None:
        self.database.close()


def changed(connection: sqlite3.Connection, statements: Sequence[Statement]) -> list[int]:
    """Runs the statements; how many rows each has changed."""
    return [connection.execute(query, _by_number(values)).rowcount for query, values in statements]


def _by_number(values: Sequence[Any]) -> dict[str, Any]:
    """$1 is a name to SQLite."""
    return {str(number): value for number, value in enumerate(values, start=1)}
