"""Knows what an engine's prefix cache holds from its KV events alone, as a router does."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection

import msgspec

from sapwood.schema.kv_events import (
    DEVICE_TIER,
    HOST_TIER,
    STORAGE_TIER,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    PageHash,
)
from tests.memory.mirror import Mirror

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(KVEvent).decode


class EventFollower:
    """pages: hash -> (hash of the page before, tokens), of those on the device
    behind  by further tier: the same"""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.pages: dict[int, tuple[int | None, list[int]]] = {}
        self.behind: dict[str, dict[int, tuple[int | None, list[int]]]] = {
            HOST_TIER: {},
            STORAGE_TIER: {},
        }
        self.lora_ids: dict[int, int | None] = {}

    def take(self, event: KVEvent) -> None:
        event = _decode(_encode(event))  # as it comes over the wire
        if isinstance(event, BlockStored):
            (name,) = event.block_hashes
            pages = self._of(event.medium)
            assert name not in pages, "stored twice"
            assert event.block_size == self._page_size == len(event.token_ids), "a part of a page"
            parent = event.parent_block_hash
            pages[name] = parent, event.token_ids
            if event.medium == DEVICE_TIER:
                assert parent is None or parent in pages, "stored before its parent"
                self.lora_ids[name] = event.lora_id
        elif isinstance(event, BlockRemoved):
            for name in event.block_hashes:
                del self._of(event.medium)[name]
                if event.medium == DEVICE_TIER:
                    del self.lora_ids[name]
        else:
            assert isinstance(event, AllBlocksCleared)
            self.pages.clear()
            self.lora_ids.clear()
            for known in self.behind.values():
                known.clear()

    def _of(self, medium: str | None) -> dict[int, tuple[int | None, list[int]]]:
        assert medium is not None, "every event tells the tier"
        return self.pages if medium == DEVICE_TIER else self.behind[medium]

    def check_host(self, digests: Collection[bytes]) -> None:
        """It knows exactly the pages that the host has, by their digests; and of each what its
        hash stands for is one thing, wherever it is."""
        assert {PageHash.name(digest) for digest in digests} == self.behind[HOST_TIER].keys()
        for known in self.behind.values():
            for name, page in known.items():
                assert self.pages.get(name, page) == page, "another page of the same name"

    def check(self, mirror: Mirror, pool: int) -> None:
        """It knows exactly the pages that the tree has in the pool that keeps every token."""
        size = self._page_size * 4
        found = {}
        for namespace, key, where in mirror.content:
            if where != pool:
                continue
            names = names_of(namespace, key, size)
            parent = names[-2] if len(names) > 1 else None
            found[names[-1]] = parent, array("I", key[-size:]).tolist()
        assert found == self.pages


def names_of(namespace: str, key: bytes, page_bytes: int) -> list[int]:
    """The names of the pages of a key, in a namespace without branches."""
    digest = hashlib.sha256(namespace.encode()).digest() if namespace else b""
    names = []
    for start in range(0, len(key), page_bytes):
        digest = hashlib.sha256(digest + key[start : start + page_bytes]).digest()
        names.append(int.from_bytes(digest[:8], "big", signed=True))
    return names
