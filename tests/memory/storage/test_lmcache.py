"""Copies of pages on LMCache's server."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from socket import create_server

import pytest

from sapwood.memory.storage.checked import checked
from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.lmcache import (
    ASKED,
    TOLD,
    Command,
    LMCacheStorage,
    address_of,
)
from tests.memory.storage.lmcache_server import lmcache_server
from tests.memory.storage.test_file import KEYS, page, read

EVERY = [bytes(page(index)) for index in range(len(KEYS))]


def test_copies_are_shared_and_broken_ones_are_misses() -> None:
    with lmcache_server() as url:
        storage, other = LMCacheStorage.of({"url": url}), LMCacheStorage.of({"url": url})
        assert other.batch_exists(KEYS) == 0
        assert read(other, KEYS) == []
        assert storage.batch_set(KEYS[:3], [page(index) for index in range(3)]) == 3
        assert other.batch_set(KEYS, [page(index) for index in range(len(KEYS))]) == len(KEYS)
        assert storage.batch_set(KEYS[:1], [page(7)]) == 1, "what is there stays as it is"
        assert other.batch_exists([*KEYS[:2], "f" * 64, KEYS[2]]) == 2
        assert read(storage, KEYS) == read(other, KEYS) == EVERY
        for broken in (checked(page(9))[:-1] + b"\xff", b"\xff" * 40, b""):
            with storage._connection() as connection:
                key = storage._key(KEYS[2])
                connection.sendall(
                    ASKED.pack(Command.PUT, len(broken), 4, 6, 0, len(broken), 0, 0, 0, key)
                )
                connection.sendall(broken)
            assert storage.batch_exists(KEYS) == len(KEYS), "they came one after the other"
            assert read(storage, KEYS) == EVERY[:2]
        with pytest.raises(StorageUnavailable, match="removes nothing"):
            storage.clear()
        apart = LMCacheStorage.of({"url": url, "prefix": "another"})
        assert apart.batch_exists(KEYS) == 0
        for one in (storage, other, apart):
            one.close()


def test_a_server_that_goes_and_comes_is_said_and_found_again() -> None:
    with pytest.raises(StorageUnavailable, match="does not answer"):
        LMCacheStorage(("127.0.0.1", 1))
    with lmcache_server() as url:
        storage = LMCacheStorage.of({"url": url})
        assert storage.batch_set(KEYS[:1], [page(0)]) == 1
    with pytest.raises(StorageUnavailable, match="does not answer"):
        storage.batch_exists(KEYS)
    with lmcache_server() as url:
        storage._address = address_of(url)
        assert storage.batch_exists(KEYS) == 0
        storage.close()


@pytest.mark.parametrize("answer", [b"", b"\xff" * 400, TOLD.pack(200, 2**31 - 1, *[0] * 7) * 9])
def test_a_server_of_nonsense_costs_no_memory_and_no_longer_than_the_limit(answer: bytes) -> None:
    """It says nothing, anything, or that two gigabytes follow."""
    with closing(create_server(("127.0.0.1", 0))) as server:
        kept = []

        def talk() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return
                kept[-1].sendall(answer)

        threading.Thread(target=talk, daemon=True).start()
        start_s = time.monotonic()
        with pytest.raises(StorageUnavailable, match="does not answer"):
            LMCacheStorage(server.getsockname()[:2], timeout_s=0.3)
        assert time.monotonic() - start_s < 30
        server.shutdown(2)
        for one in kept:
            one.close()


def test_addresses() -> None:
    assert address_of("lm://10.0.0.1:7") == ("10.0.0.1", 7)
    assert address_of("lmcache://[::1]") == ("::1", 65432)
    for bad in ("", "http://a:1", "lm://", "lm://a:99999", "lm://a:b", "\0"):
        with pytest.raises(StorageUnavailable, match="must be lm://host:port"):
            address_of(bad)
