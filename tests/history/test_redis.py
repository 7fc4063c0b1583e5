"""What only a history in Redis does."""

from __future__ import annotations

import asyncio

import pytest

from sapwood.base.errors import ConfigError
from sapwood.history.interface import DAY_S, Conversation, HistoryUnavailable
from tests.history.servers import redis_server
from tests.history.test_history import message, response

redis = pytest.importorskip("sapwood.history.redis", reason="the package redis is not installed")


def test_every_key_is_forgotten_in_the_end(redis_url: str) -> None:
    async def run() -> None:
        async with redis.open_client(redis_url, max_connections=2) as client:
            await client.flushall()
            history = redis.RedisHistory(client, retention_days=2.0)
            made = Conversation(id="conv_1", created_at=1.0, metadata={})
            await history.create_conversation(made, [message("0")])
            await history.add(response(), [message("1")], "conv_1")
            keys = await client.keys("*")
            assert len(keys) == 4
            for key in keys:
                assert 2 * DAY_S - 60 < await client.ttl(key) <= 2 * DAY_S

    asyncio.run(run())


def test_a_server_that_is_gone() -> None:
    async def run() -> None:
        with redis_server() as url:
            opening = redis.open_redis(url, max_connections=2, retention_days=1.0)
            history = await opening.__aenter__()
            await history.add(record := response(), [])
        with pytest.raises(HistoryUnavailable, match="does not answer"):
            await history.record(record["id"])
        await opening.__aexit__(None, None, None)
        with pytest.raises(ConfigError, match="--redis-url"):
            async with redis.open_redis(url, max_connections=2, retention_days=1.0):
                pass

    asyncio.run(run())


def test_an_address_that_is_none() -> None:
    async def run() -> None:
        with pytest.raises(ConfigError, match="--redis-url"):
            async with redis.open_client("mailto:secret", max_connections=2):
                pass

    asyncio.run(run())
