"""Copies of pages in a real store of Mooncake."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.memory.storage.mooncake_server import mooncake_master
from tests.memory.storage.test_file import KEYS, page, read

pytest.importorskip("mooncake.store", exc_type=ImportError)

from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.mooncake import MooncakeStorage


def test_copies_are_shared_and_broken_ones_are_misses(tmp_path: Path) -> None:
    with mooncake_master(tmp_path) as address:
        settings = {"master_server_address": address, "global_segment_size": "0.0625gb"}
        storage = MooncakeStorage.of(settings)
        other = MooncakeStorage.of({**settings, "global_segment_size": "0gb"})
        assert other.batch_exists(KEYS) == 0
        assert read(other, KEYS) == []
        assert storage.batch_set(KEYS, [page(index) for index in range(len(KEYS))]) == len(KEYS)
        assert storage.batch_set(KEYS[:1], [page(7)]) == 1, "what is there stays as it is"
        assert other.batch_exists(KEYS) == len(KEYS)
        assert read(other, KEYS) == [bytes(page(index)) for index in range(len(KEYS))]
        broken = "sapwood-kv-" + KEYS[2]
        assert storage._store.remove(broken, True) == 0
        assert storage._store.put(broken, b"\xff" * 40) == 0
        assert read(other, KEYS) == [bytes(page(0)), bytes(page(1))]
        storage._store.put("another program's", b"x")
        storage.clear()
        assert other.batch_exists(KEYS) == 0
        assert storage._store.is_exist("another program's") == 1
        for one in (other, storage):
            one.close()


def test_a_master_that_is_gone_is_said(tmp_path: Path) -> None:
    with mooncake_master(tmp_path) as address:
        pass
    with pytest.raises(StorageUnavailable, match="cannot be reached"):
        MooncakeStorage.of({"master_server_address": address, "global_segment_size": "0.0625gb"})
