from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from sapwood.app.gateway.history import open_history
from sapwood.history.interface import History
from sapwood.schema.config.gateway import GatewayConfig
from tests.history.servers import postgres_server, redis_server
from tests.tiers import long_only

Opened = Callable[..., AbstractAsyncContextManager[History]]


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["memory", "sqlite", "redis", *long_only("postgres")])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """Opens the store of a gateway; what is kept is there when it is opened again."""
    options = {"history_backend": request.param}
    if request.param == "redis":
        options["redis_url"] = request.getfixturevalue("redis_url")
    elif request.param == "postgres":
        options["postgres_db_url"] = request.getfixturevalue("postgres_url")

    @asynccontextmanager
    async def open_(**more: float) -> AsyncIterator[History]:
        async with open_history(GatewayConfig(**options, **more), tmp_path) as history:
            assert history is not None
            yield history

    return open_
