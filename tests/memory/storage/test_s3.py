"""Copies of pages as objects of a real server of S3's protocol, which may end at any time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import obstore
import pytest

from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.s3 import S3Storage
from tests.memory.storage.s3_server import s3_server
from tests.memory.storage.test_file import KEYS, page, read


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with s3_server() as settings:
        yield settings


def test_copies_are_shared_and_broken_ones_are_misses(bucket: dict[str, str]) -> None:
    storage = S3Storage.of(bucket)
    pages = [page(index) for index in range(len(KEYS))]
    assert storage.batch_exists(KEYS) == 0
    assert storage.batch_set(KEYS, pages) == len(KEYS)
    other = S3Storage.of(bucket)
    assert other.batch_exists(KEYS) == len(KEYS)
    assert read(other, KEYS) == [bytes(one) for one in pages]
    path = "sapwood/kv/" + KEYS[2]
    content = bytearray(obstore.get(storage._store, path).bytes())
    content[300] ^= 1
    for broken in (content, content[:-1], b"", bytes(1 << 20)):
        obstore.put(storage._store, path, bytes(broken))
        assert read(other, KEYS) == [bytes(one) for one in pages[:2]]
    obstore.put(storage._store, "another program's", b"x")
    other.clear()
    assert other.batch_exists(KEYS) == 0
    left = [one["path"] for listed in obstore.list(storage._store) for one in listed]
    assert left == ["another program's"]
    for one in (storage, other):
        one.close()


def test_what_cannot_be_used_is_said(bucket: dict[str, str]) -> None:
    for wrong in (
        {**bucket, "access_key_id": "nobody"},
        {**bucket, "endpoint_url": "http://127.0.0.1:1"},
        {**bucket, "bucket": "no-such-bucket"},
    ):
        with pytest.raises(StorageUnavailable, match=r"S3 says|no such bucket"):
            S3Storage.of({**wrong, "timeout_s": 0.5})


def test_a_server_that_is_gone_is_said_in_time() -> None:
    with s3_server() as settings:
        storage = S3Storage.of({**settings, "timeout_s": 0.5})
        storage.batch_set(KEYS[:1], [page(0)])
    for call in (
        lambda: storage.batch_exists(KEYS),
        lambda: read(storage, KEYS),
        lambda: storage.batch_set(KEYS[:1], [page(0)]),
        storage.clear,
    ):
        start_s = time.monotonic()
        with pytest.raises(StorageUnavailable, match="S3 says"):
            call()
        assert time.monotonic() - start_s < 3.0
    storage.close()
