"""PostgreSQL as the database of a history, by asyncpg."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from sapwood.base.errors import ConfigError
from sapwood.history.interface import HistoryUnavailable
from sapwood.history.sql import MIGRATIONS, Statement

SCHEMA = "sapwood"
"""The tables are in a schema of their own, beside those of other programs."""

TIMEOUT_S = 10.0
_LOCK = 0x5A9_00D
"""Gateways that start together take turns with the migrations."""


class PostgresRows:
    """The SqlRows of a pool of connections."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def fetch(self, query: str, *values: Any) -> Sequence[Sequence[Any]]:
        async with self._connection() as connection:
            rows: Sequence[Sequence[Any]] = await connection.fetch(query, *values)
            return rows

    async def change(self, statements: Sequence[Statement]) -> list[int]:
        async with self._connection() as connection, connection.transaction():
            # The answer to a statement ends with the number of its rows: "UPDATE 1".
            return [
                int((await connection.execute(query, *values)).rpartition(" ")[2])
                for query, values in statements
            ]

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            async with self._pool.acquire(timeout=TIMEOUT_S) as connection:
                yield connection
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise HistoryUnavailable(
                f"the database of conversations does not answer ({type(error).__name__}); try "
                "again later"
            ) from error


@asynccontextmanager
async def open_postgres(url: str, *, max_connections: int) -> AsyncIterator[PostgresRows]:
    """The database at that address, with its tables up to date.

    Raises ConfigError if it cannot be used, or if a newer version of sapwood has changed it."""
    try:
        pool = await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=max_connections,
            command_timeout=TIMEOUT_S,
            timeout=TIMEOUT_S,
            server_settings={"search_path": SCHEMA, "application_name": "sapwood"},
        )
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError) as error:
        # The error's text may hold the address, and that a password.
        raise ConfigError(
            f"the database of --postgres-db-url cannot be used ({type(error).__name__})"
        ) from error
    try:
        async with pool.acquire() as connection:
            await _migrate(connection)
        yield PostgresRows(pool)
    finally:
        await pool.close()


async def _migrate(connection: Any) -> None:
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        await connection.execute("CREATE TABLE IF NOT EXISTS version (number INTEGER NOT NULL)")
        version = await connection.fetchval("SELECT max(number) FROM version") or 0
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"the database of --postgres-db-url is of version {version}, but this sapwood "
                f"knows versions up to {len(MIGRATIONS)}; use the newer sapwood, or another "
                "database"
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            await connection.execute(script)
            await connection.execute("INSERT INTO version VALUES ($1)", number)
