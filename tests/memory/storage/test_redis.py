"""Copies of pages on a real server of Redis, which may end at any time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.redis import RedisStorage
from tests.history.servers import redis_server
from tests.memory.storage.test_file import KEYS, page, read


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with redis_server() as url:
        yield url


def test_copies_are_shared_and_broken_ones_are_misses(url: str) -> None:
    storage = RedisStorage.of({"url": url, "ttl_s": 60})
    storage.batch_set(KEYS, [page(index) for index in range(len(KEYS))])
    other = RedisStorage.of({"url": url})
    assert other.batch_exists(KEYS) == len(KEYS)
    assert read(other, KEYS) == [bytes(page(index)) for index in range(len(KEYS))]
    client = Redis.from_url(url)
    assert 0 < client.ttl("sapwood:kv:" + KEYS[0]) <= 60
    client.setrange("sapwood:kv:" + KEYS[2], 300, b"\xff")
    assert read(other, KEYS) == [bytes(page(0)), bytes(page(1))]
    client.set("sapwood:kv:" + KEYS[1], b"")
    assert read(other, KEYS) == [bytes(page(0))]
    client.set("another program's", b"x")
    other.clear()
    assert other.batch_exists(KEYS) == 0
    assert client.keys() == [b"another program's"]
    client.close()
    for one in (storage, other):
        one.close()


def test_a_server_that_is_gone_is_said() -> None:
    with redis_server() as url:
        storage = RedisStorage.of({"url": url, "timeout_s": 0.2})
        storage.batch_set(KEYS[:1], [page(0)])
    for call in (
        lambda: storage.batch_exists(KEYS),
        lambda: read(storage, KEYS),
        lambda: storage.batch_set(KEYS[:1], [page(0)]),
        storage.clear,
        lambda: RedisStorage.of({"url": url, "timeout_s": 0.2}),
    ):
        with pytest.raises(StorageUnavailable, match="Redis says"):
            call()
    with pytest.raises(StorageUnavailable, match="its url is none"):
        RedisStorage.of({"url": "file:///etc/passwd"})
