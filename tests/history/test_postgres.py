"""What only a history in PostgreSQL does."""

from __future__ import annotations

import asyncio

import pytest

from sapwood.base.errors import ConfigError
from sapwood.history.interface import HistoryUnavailable
from sapwood.history.sql import MIGRATIONS, SqlHistory
from tests.history.servers import postgres_server
from tests.history.test_history import response

asyncpg = pytest.importorskip("asyncpg", reason="the package asyncpg is not installed")
from sapwood.history.postgres import open_postgres  # noqa: E402 - needs that package

pytestmark = pytest.mark.long


def test_the_tables_of_a_newer_version_are_left_alone(postgres_url: str) -> None:
    async def run() -> None:
        async with open_postgres(postgres_url, max_connections=1):
            pass
        connection = await asyncpg.connect(postgres_url)
        try:
            newer = len(MIGRATIONS) + 1
            await connection.execute("INSERT INTO sapwood.version VALUES ($1)", newer)
            with pytest.raises(ConfigError, match=f"is of version {newer}"):
                async with open_postgres(postgres_url, max_connections=1):
                    pass
            await connection.execute("DELETE FROM sapwood.version WHERE number = $1", newer)
        finally:
            await connection.close()

    asyncio.run(run())


def test_gateways_that_start_together(postgres_url: str) -> None:
    async def open_and_add() -> None:
        async with open_postgres(postgres_url, max_connections=2) as rows:
            await SqlHistory(rows, retention_days=1.0).add(response(), [])

    async def run() -> None:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute("DROP SCHEMA IF EXISTS sapwood CASCADE")
        await connection.close()
        await asyncio.gather(*(open_and_add() for _ in range(4)))

    asyncio.run(run())


def test_a_server_that_is_gone() -> None:
    async def run() -> None:
        with postgres_server() as url:
            opening = open_postgres(url, max_connections=2)
            history = SqlHistory(await opening.__aenter__(), retention_days=1.0)
            await history.add(record := response(), [])
        with pytest.raises(HistoryUnavailable, match="does not answer"):
            await history.record(record["id"])
        await opening.__aexit__(None, None, None)
        with pytest.raises(ConfigError, match="--postgres-db-url"):
            async with open_postgres(url, max_connections=2):
                pass

    asyncio.run(run())
