"""Where the gateway keeps responses and conversations, as its options say."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sapwood.base.errors import ConfigError
from sapwood.history.interface import History
from sapwood.history.sql import SqlHistory
from sapwood.history.sqlite import SqliteHistory
from sapwood.schema.config.gateway import GatewayConfig

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_history(config: GatewayConfig, home: Path) -> AsyncIterator[History | None]:
    """The history inside the block; None: workers keep responses.

    home    folder of the state unless --state-dir names another; if it is not writable, the history
            is in memory
    Raises  ConfigError if the store cannot be used, or if its client library is not installed
    """
    days = config.history_retention_days
    if config.history_backend == "none":
        yield None
    elif config.history_backend == "postgres":
        try:
            from sapwood.history.postgres import open_postgres
        except ImportError as error:
            raise _missing("postgres", "asyncpg") from error
        assert config.postgres_db_url is not None
        async with open_postgres(
            config.postgres_db_url, max_connections=config.postgres_pool_max
        ) as rows:
            yield SqlHistory(rows, retention_days=days)
    elif config.history_backend == "redis":
        try:
            from sapwood.history.redis import open_redis
        except ImportError as error:
            raise _missing("redis", "redis") from error
        assert config.redis_url is not None
        async with open_redis(
            config.redis_url, max_connections=config.redis_pool_max, retention_days=days
        ) as history:
            yield history
    else:
        sqlite = _sqlite(config, home)
        try:
            yield sqlite
        finally:
            sqlite.close()


def _sqlite(config: GatewayConfig, home: Path) -> SqliteHistory:
    days = config.history_retention_days
    if config.history_backend == "memory":
        return SqliteHistory(None, retention_days=days)
    directory = Path(config.state_dir) if config.state_dir else home / "state" / "gateway"
    path = directory.expanduser().absolute() / "history.sqlite"
    try:
        return SqliteHistory(path, retention_days=days)
    except ConfigError as error:
        if config.state_dir:
            raise
        log.warning("%s. Responses and conversations are kept in memory", error)
        return SqliteHistory(None, retention_days=days)


def _missing(backend: str, package: str) -> ConfigError:
    return ConfigError(
        f"--history-backend {backend} needs the package {package}; install it with "
        f"`pip install {package}`"
    )
